"""The file of `--perplexity`: strict JSON, never over a foreign file, complete or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import edit_tensors
from eval_commands import strict_json
from full_disk import fill_disk
from safetensors.torch import load_file
from tiny_checkpoints import save_stock

from hf_depthattn.eval import perplexity_domains
from hf_depthattn.eval.perplexity import exp
from hf_depthattn.eval.perplexity_results import read_report

PERPLEXITY = ("--perplexity", "text.txt", "--window", 32, "--out", "out")


def test_a_diverged_model_is_no_perplexity_of_infinity(command):
    edit_tensors(Path("model"), lambda t: t["model.norm.weight"].fill_(math.nan))
    code, printed, errors = command("model", *PERPLEXITY)
    assert (code, errors) == (0, [])
    assert "nan" in printed and "inf" not in printed.replace("infinite", "")
    assert "text.txt: the loss of 1 of 1 documents is NaN or infinite." in printed
    file = Path("out", "perplexity.json")
    domain = strict_json(file)["domains"]["text.txt"]
    assert [domain[name] for name in ("perplexity", "bits_per_byte", "loss_nats_per_token")] == [None] * 3
    assert domain["num_documents_without_loss"] == 1
    assert math.isnan(read_report(file).mean.perplexity)
    # Given again, the command prints what is there.
    assert command("model", *PERPLEXITY)[1] == printed
    code, printed, _ = command("model", *PERPLEXITY, "--json")
    assert json.loads(printed)["mean"]["perplexity"] is None and "NaN" not in printed


def test_a_large_loss_is_a_perplexity_of_infinity(command):
    edit_tensors(Path("model"), lambda t: t["lm_head.weight"].mul_(1e5))
    code, printed, _ = command("model", *PERPLEXITY)
    assert code == 0 and "inf" in printed and "documents is NaN" not in printed
    domain = strict_json(Path("out", "perplexity.json"))["domains"]["text.txt"]
    assert domain["perplexity"] is None and domain["loss_nats_per_token"] > 700
    assert exp(2.0) == math.exp(2.0) and exp(1e4) == math.inf and math.isnan(exp(math.nan))


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', "[1]", "not JSON", '{"settings": 3}', '{"settings": {}, "domains": {}}']
)
def test_perplexity_never_overwrites_a_foreign_file(command, content, more):
    for name in ("mine.json", "folder/perplexity.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
        out = "folder" if "folder" in name else name
        code, _, errors = command("model", *PERPLEXITY[:-1], out, *more)
        assert code == 2 and len(errors) == 1 and "choose another place (--out)" in errors[0]
        assert Path(name).read_text() == content


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_the_config_of_the_model_survives(command, more):
    before = Path("model", "config.json").read_bytes()
    code, _, errors = command("model", *PERPLEXITY[:-1], "model/config.json", *more)
    assert code == 2 and len(errors) == 1 and Path("model", "config.json").read_bytes() == before


def test_a_folder_called_like_the_file_is_refused_before_the_work(command, monkeypatch):
    Path("out.json").mkdir()
    monkeypatch.setattr(perplexity_domains, "evaluate_domains", lambda *a, **k: pytest.fail("the model was run"))
    code, _, errors = command("model", *PERPLEXITY[:-1], "out.json")
    assert code == 2 and "out.json: is a folder" in errors[0]


def test_overwrite_forgets_own_results_when_the_new_ones_are_there(command):
    assert command("model", *PERPLEXITY)[0] == 0
    file = Path("out", "perplexity.json")
    before = file.read_text()
    arguments = ["model", "--perplexity", "text.txt", "--window", 16, "--out", "out"]
    assert command(*arguments)[0] == 2 and file.read_text() == before
    Path("short.txt").write_text("short")
    # A mistake does not cost the results that are there.
    code, _, errors = command("model", "--perplexity", "short.txt", "--out", "out", "--overwrite")
    assert code == 2 and file.read_text() == before, errors
    assert command(*arguments, "--overwrite")[0] == 0
    assert strict_json(file)["settings"]["window"] == 16


def test_perplexity_without_room_is_one_line(command, monkeypatch):
    with monkeypatch.context() as patched:
        fill_disk(patched, 300)
        code, out, errors = command("model", *PERPLEXITY)
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0] == "depthattn: error: out/perplexity.json: No space left on device"
    assert not list(Path("out").iterdir())
    assert command("model", *PERPLEXITY)[0] == 0


def test_the_weights_of_a_test_model_are_numbers(tmp_path):
    # Guards the tests above: the tiny model itself has not diverged.
    assert all(torch.isfinite(t).all() for t in load_file(save_stock(tmp_path / "m") / "model.safetensors").values())
