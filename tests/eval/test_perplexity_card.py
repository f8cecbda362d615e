"""`depthattn eval --perplexity --update-card`: the card has the numbers of the report."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_depthattn import retrofit


def test_the_card_has_the_numbers_of_the_report(command):
    retrofit("model", "depth", num_blocks=2)
    before = Path("depth", "README.md").read_text()
    arguments = ["depth", "--perplexity", "name=text.txt", "--window", "64", "--out", "run", "--update-card"]
    for _ in range(2):
        code, printed, errors = command(*arguments)
        assert (code, errors) == (0, [])
    domain = json.loads(Path("run", "perplexity.json").read_text())["domains"]["name"]
    card = ModelCard.load(Path("depth", "README.md"))
    found = {result.metric_type: result for result in card.data.eval_results}
    assert set(found) == {"bits_per_byte", "perplexity"}
    for metric, result in found.items():
        assert result.metric_value == pytest.approx(domain[metric], abs=1e-6)
        assert result.dataset_name == "name" and result.metric_name.endswith(", window 64, stride 32")
    assert printed.partition("\n\nin ")[0] in card.text
    # A run on another text has a part of its own, as it has results of its own.
    assert card.text.count("<!-- evaluation: perplexity of name -->") == 1
    assert before.partition("---\n\n")[2].rstrip() in card.text
    assert {"custom_code", "attention-residuals"} <= set(card.data.tags)
