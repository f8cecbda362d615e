"""Evaluation results in model cards: what is written is what huggingface_hub reads, and the rest of a card stays."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, parse_eval_result_entries

from hf_depthattn.errors import UserError
from hf_depthattn.eval.card import read_card, update_card

CARD = "---\nlicense: mit\ntags:\n- custom_code\n---\n\n# A model\n\nIts text.\n"


def result(value: float = 61.5, **fields) -> EvalResult:
    required = {"task_type": "text-generation", "dataset_type": "org/data", "dataset_name": "task"}
    return EvalResult(**required, metric_type="acc", metric_value=value, **fields)


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "README.md").write_text(CARD)
    return tmp_path


def test_results_are_read_back_and_the_card_stays(model):
    update_card(str(model), [result(source_name="lm-eval", source_url="https://x.org")], section="a", table="| 61.5 |")
    card = ModelCard.load(model / "README.md", ignore_metadata_errors=False)
    (read,) = card.data.eval_results
    assert read.metric_value == 61.5 and read.source_name == "lm-eval"
    assert (card.data.license, card.data.tags, card.data.model_name) == ("mit", ["custom_code"], model.name)
    assert "# A model\n\nIts text.\n\n<!-- evaluation: a -->\n| 61.5 |\n<!-- end of evaluation: a -->\n" in card.text
    assert sorted(path.name for path in model.iterdir()) == ["README.md"]


def test_another_run_of_a_task_replaces_its_results(model):
    few, many = {"metric_name": "acc, 0 shots"}, {"metric_name": "acc, 5 shots"}
    update_card(str(model), [result(1.0, **few), result(2.0, **many)], section="a", table="one")
    update_card(str(model), [result(3.0, **few)], section="b", table="two")
    update_card(str(model), [result(4.0, **few)], section="a", table="three")
    card = ModelCard.load(model / "README.md")
    assert [read.metric_value for read in card.data.eval_results] == [2.0, 4.0]
    assert "one" not in card.text and card.text.count("<!-- evaluation: a -->") == 1
    assert card.text.index("three") < card.text.index("two")


def test_results_that_are_no_numbers_are_left_out(model):
    update_card(str(model), [result(1.0)], section="a", table="t")
    entry = EvalResultEntry(dataset_id="org/data", task_id="task", value=float("nan"))
    update_card(str(model), [result(float("inf"))], benchmarks={"task": entry}, section="a", table="t")
    assert ModelCard.load(model / "README.md").data.eval_results is None
    assert not (model / ".eval_results").exists()


def test_benchmarks_of_the_hub_have_files_of_their_own(model):
    entry = EvalResultEntry(dataset_id="openai/gsm8k", task_id="gsm8k", value=12.5, notes="8 shots")
    for _ in range(2):
        update_card(str(model), [result()], benchmarks={"gsm8k_cot": entry}, section="a", table="t")
    (file,) = (model / ".eval_results").iterdir()
    assert parse_eval_result_entries(yaml.safe_load(file.read_text())) == [entry]


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "has no README.md"),
        ("---\nlicense: [\n---\n", "README.md: "),
        ("---\nmodel-index:\n- results: 3\n---\n", "README.md: "),
    ],
)
def test_a_model_without_a_readable_card_is_refused(tmp_path, card, words):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with pytest.raises(UserError, match=f"--update-card: .*{words}"):
        read_card(str(tmp_path))


def test_a_repository_of_the_hub_is_refused():
    with pytest.raises(UserError, match="--update-card: org/model is not a local folder"):
        read_card("org/model")
