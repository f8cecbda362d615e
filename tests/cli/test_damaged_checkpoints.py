"""`eval` and `report` refuse, in one line, a model that is not all of its checkpoint; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged_checkpoints import DAMAGE, DAMAGED_FILES, edit_tensors
from tiny_checkpoints import edit_config, save_stock

from hf_depthattn.cli.main import main
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT

SIZES = ("--num-sequences", "2", "--sequence-length", "16")


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Run `depthattn` in a folder with a text; returns exit code, stdout and the lines of stderr."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(DEFAULT_TEXT, encoding="utf-8")

    def run(*arguments) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return run


def scored_by(name: str, folder: Path) -> tuple:
    """The arguments by which a command scores a checkpoint."""
    if name == "report":
        pytest.importorskip("altair")
        pytest.importorskip("vl_convert")
        return "report", folder, "--text", "text.txt", "--out", "out", *SIZES
    return "eval", folder, "--perplexity", "text.txt", "--window", 32, "--out", "out"


@pytest.mark.parametrize("name", ["eval", "report"])
@pytest.mark.parametrize("label", [*DAMAGE, *DAMAGED_FILES])
def test_a_wrong_checkpoint_is_one_line(command, name, label):
    folder = save_stock(Path("model"))
    if label in DAMAGE:
        edit, fields, _ = DAMAGE[label]
        edit_tensors(folder, edit)
        edit_config(folder, **fields)
    else:
        DAMAGED_FILES[label](folder)
    code, out, errors = command(*scored_by(name, folder))
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("depthattn: error: model")
    assert not list(Path().glob("out/*.json"))


@pytest.mark.parametrize("name", ["eval", "report"])
@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line(command, name, device):
    folder = save_stock(Path("model"))
    code, out, errors = command(*scored_by(name, folder), "--device", device)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert f"device: '{device}' " in errors[0]


@pytest.mark.parametrize("name", ["eval", "report"])
def test_token_ids_beyond_the_vocabulary_are_one_line(command, name):
    folder = save_stock(Path("model"), vocab_size=40)
    code, out, errors = command(*scored_by(name, folder))
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert "tokenizer returns token id " in errors[0] and "the model has only 40" in errors[0]


@pytest.mark.parametrize("name", ["eval", "report"])
def test_an_adapter_in_place_of_a_model_is_told_its_option(command, name):
    folder = save_stock(Path("model"))
    (folder / "adapter_config.json").write_text("{}")
    code, out, errors = command(*scored_by(name, folder))
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("depthattn: error: model: is an adapter") and "--peft" in errors[0]


@pytest.mark.parametrize("name", ["eval", "report"])
def test_an_output_of_nobody_is_one_line(command, name):
    arguments = [*scored_by(name, save_stock(Path("model"))), "--out=~nosuchuser/out"]
    code, out, errors = command(*arguments)
    assert (code, out, errors) == (2, "", ["depthattn: error: ~nosuchuser/out: no such user."])
    assert not Path("~nosuchuser").exists()
