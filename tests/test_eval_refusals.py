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
    assert "tokenizer gives token " in errors[0] and "the model knows 40" in errors[0]


@pytest.mark.parametrize("name", ["eval", "report"])
def test_an_adapter_in_place_of_a_model_is_told_its_option(command, name):
    folder = save_stock(Path("model"))
    (folder / "adapter_config.json").write_text("{}")
    code, out, errors = command(*scored_by(name, folder))
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0].startswith("depthattn: error: model: holds an adapter") and "--peft" in errors[0]


@pytest.mark.parametrize("name", ["eval", "report"])
def test_an_output_of_nobody_is_one_line(command, name):
    arguments = [*scored_by(name, save_stock(Path("model"))), "--out=~nosuchuser/out"]
    code, out, errors = command(*arguments)
    assert (code, out, errors) == (2, "", ["depthattn: error: ~nosuchuser/out: no such user."])
    assert not Path("~nosuchuser").exists()


# --- lm-eval's own path ---


@pytest.fixture(scope="module")
def lm_class():
    pytest.importorskip("lm_eval")
    from hf_depthattn.eval.harness.model import DepthAttnLM

    return DepthAttnLM


def request(context: str, continuation: str):
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


@pytest.mark.parametrize("label", [label for label in DAMAGE if label != "another shape"])
def test_lm_evals_model_refuses_a_wrong_checkpoint(lm_class, tmp_path, label):
    from hf_depthattn.errors import UserError

    folder = save_stock(tmp_path / "model")
    edit, fields, message = DAMAGE[label]
    edit_tensors(folder, edit)
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=message):
        lm_class(str(folder), device="cpu")


@pytest.mark.parametrize("device", ["banana", "meta"])
def test_lm_evals_model_takes_no_other_device(lm_class, tmp_path, device):
    from hf_depthattn.errors import UserError

    with pytest.raises(UserError, match=f"device: '{device}' "):
        lm_class(str(save_stock(tmp_path / "model")), device=device)


def test_lm_evals_model_refuses_token_ids_beyond_the_vocabulary(lm_class, tmp_path):
    from hf_depthattn.errors import UserError

    model = lm_class(str(save_stock(tmp_path / "model", vocab_size=40)), device="cpu")
    assert len(model.loglikelihood([request("abc", "d")])) == 1
    with pytest.raises(UserError, match=r"/model: its tokenizer gives token 4., the model knows 40"):
        model.loglikelihood([request("abc", "RST")])


def test_lm_evals_model_refuses_an_adapter_without_a_place(lm_class, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_depthattn.checkpoints.model_loading import load_model
    from hf_depthattn.errors import UserError

    folder, deeper = save_stock(tmp_path / "model"), save_stock(tmp_path / "deeper", num_hidden_layers=4)
    for base in (folder, deeper):
        adapted = peft.get_peft_model(load_model(base), peft.LoraConfig(r=2, target_modules=["up_proj"]))
        adapted.save_pretrained(tmp_path / f"adapter of {base.name}")
    assert lm_class(str(folder), device="cpu", peft=str(tmp_path / "adapter of model")).loglikelihood(
        [request("abc", "d")]
    )
    with pytest.raises(UserError, match=r"adapter of deeper: 2 of its tensors have no place in LlamaForCausalLM"):
        lm_class(str(folder), device="cpu", peft=str(tmp_path / "adapter of deeper"))
    with pytest.raises(UserError, match=r"adapter of model: lacks 2 tensors of its layers"):
        lm_class(str(deeper), device="cpu", peft=str(tmp_path / "adapter of model"))
