"""The command `depthattn`: exit codes, one line per mistake, the reports; `verify` finds differences."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny_checkpoints import load, save_stock, weights_of
from transformers import PreTrainedConfig

import hf_depthattn
from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE
from hf_depthattn.cli.main import build_parser, main
from hf_depthattn.configuration_depthattn import DepthAttnConfig
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.depth_options import DEPTH_OPTIONS, option_default
from hf_depthattn.eval.verify.comparison import Measured, compare
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT
from hf_depthattn.eval.verify.verify import verify
from hf_depthattn.utils import progress
from hf_depthattn.utils.argument_checks import DTYPES


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def retrofitted(stock, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrofitted") / "out"
    retrofit(stock, folder, num_blocks=4)
    return folder


@pytest.fixture(scope="module")
def bare(stock, tmp_path_factory) -> Path:
    """The stock checkpoint without its tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "llama"
    return Path(shutil.copytree(stock, folder, ignore=shutil.ignore_patterns("tokenizer*")))


@pytest.fixture
def command(capfd, monkeypatch):
    """Run the command; returns exit code, stdout and the lines of stderr, without the progress of a slow machine."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", math.inf)

    def run(*arguments) -> tuple[int, str, list[str]]:
        # What the test itself has caused is not the command's.
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return run


def test_retrofit_verify_restore(stock, tmp_path, command):
    out, back = tmp_path / "out", tmp_path / "back"
    code, printed, errors = command("retrofit", stock, out, "--num-blocks", 3)
    assert (code, errors) == (0, [])
    assert "DepthAttnForCausalLM" in printed and "4 sublayers per block" in printed and "linked" in printed

    code, printed, errors = command("verify", stock, out)
    assert (code, errors) == (0, [])
    for quantity in ("largest |logit|", "greedy tokens", "perplexity"):
        assert any(line.startswith(quantity) and line.endswith("yes") for line in printed.splitlines()), printed

    code, printed, errors = command("restore", out, back)
    assert (code, errors) == (0, []) and "LlamaForCausalLM" in printed
    load(back)


def test_reports_as_json(stock, tmp_path, command):
    report = json.loads(command("retrofit", stock, tmp_path / "out", "--sublayers-per-block", 1, "--json")[1])
    assert report["sublayers_per_block"] == 1 and report["num_sources"] == 9 and report["model_type"] == "llama"
    report = json.loads(command("verify", stock, tmp_path / "out", "--json", "--max-new-tokens", 4)[1])
    assert report["ok"] and [row["ok"] for row in report["comparisons"]] == [True] * 3
    report = json.loads(command("restore", tmp_path / "out", tmp_path / "back", "--json")[1])
    assert report["architecture"] == "LlamaForCausalLM"


def test_set_reaches_every_config_field(stock, tmp_path, command):
    fields = ["--set", "key_norm=false", "--set", "query=input", "--set", "depth_norm_eps=1e-5"]
    assert command("retrofit", stock, tmp_path / "out", *fields)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["key_norm"] is False and config["query"] == "input" and config["depth_norm_eps"] == 1e-5


def test_verify_reads_a_text_of_any_length(stock, retrofitted, tmp_path, command):
    text = tmp_path / "text.txt"
    for length in (2, 100, 40_000):
        text.write_text((DEFAULT_TEXT * 20)[:length], encoding="utf-8")
        code, printed, errors = command("verify", stock, retrofitted, "--text", text, "--max-new-tokens", 3)
        assert (code, errors) == (0, []), printed


@pytest.mark.parametrize("dtype", DTYPES)
def test_verify_in_every_dtype(dtype, stock, retrofitted, command):
    code, printed, _ = command("verify", stock, retrofitted, "--dtype", dtype)
    assert code == 0, printed


@pytest.mark.parametrize(
    "key",
    ["model.depth_reads.query", "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"],
)
def test_verify_finds_a_changed_tensor(key, stock, retrofitted, tmp_path, command):
    changed = Path(shutil.copytree(retrofitted, tmp_path / "changed"))
    for path in weights_of(changed):
        tensors = load_file(path)
        if key in tensors:
            # Not the first row: site 0 reads one source, whatever its query is.
            tensors[key].view(-1)[-3:] += 0.05
            save_file(tensors, path, metadata={"format": "pt"})
    code, printed, errors = command("verify", stock, changed)
    assert (code, errors) == (1, []) and "THE CHECKPOINTS DIFFER" in printed, printed


def test_verify_without_a_tokenizer(bare, tmp_path, command):
    out = tmp_path / "out"
    code, _, errors = command("retrofit", bare, out)
    assert code == 2 and len(errors) == 1 and "--allow-missing-tokenizer" in errors[0]
    assert command("retrofit", bare, out, "--allow-missing-tokenizer")[0] == 0
    code, _, errors = command("verify", bare, out)
    assert code == 2 and len(errors) == 1 and "--allow-missing-tokenizer" in errors[0]
    code, printed, _ = command("verify", bare, out, "--allow-missing-tokenizer")
    assert code == 0 and "perplexity" not in printed


def test_verify_of_a_model_without_language_modelling_head(bare, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(bare).save_pretrained(tmp_path / "base")
    retrofit(tmp_path / "base", tmp_path / "out")
    report = verify(tmp_path / "base", tmp_path / "out", require_tokenizer=False)
    assert report.ok and [row.quantity for row in report.comparisons] == ["largest |output|"]


def test_a_near_tie_may_fall_either_way_in_half_precision_only():
    logits = torch.tensor([[0.0, 1.0, 5.0], [5.0, 4.95, 0.0], [0.0, 0.0, 5.0]])

    def row(theirs, ours, dtype):
        host = Measured([logits], [theirs], [logits], None)
        return compare(host, Measured([logits], [ours], [logits], None), dtype)[1]

    assert row([2, 0, 2], [2, 0, 2], "float32").ok
    assert not row([2, 0, 2], [2, 1, 2], "float32").ok
    assert row([2, 0, 2], [2, 1, 2], "bfloat16").ok
    assert row([2, 0, 2], [2, 2, 2], "bfloat16").difference == 2
    assert not row([2, 0, 2], [2], "bfloat16").ok


def test_nan_is_a_difference():
    logits = torch.ones(1, 3)
    host, broken = (Measured([x], [], [], 1.0) for x in (logits, logits * float("nan")))
    assert not compare(host, broken, "float32")[0].ok
    assert not compare(broken, host, "float32")[0].ok


def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint with a truncated shard."""
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    os.truncate(weights_of(copy)[-1], 1000)
    return copy


# label -> arguments (with {stock}, {out}, {tmp}, {cut}), words of the message
MISTAKES = {
    "no command": ("", ["COMMAND"]),
    "unknown command": ("convert {stock} {tmp}/new", ["'convert'", "'retrofit'"]),
    "missing argument": ("retrofit {stock}", ["OUT"]),
    "unknown option": ("retrofit {stock} {tmp}/new --blocks 3", ["--blocks"]),
    "abbreviated option": ("retrofit {stock} {tmp}/new --num 3", ["--num"]),
    "not a number": ("retrofit {stock} {tmp}/new --num-blocks three", ["--num-blocks", "'three'"]),
    "both block sizes": ("retrofit {stock} {tmp}/new --num-blocks 2 --sublayers-per-block 2", ["not allowed with"]),
    "too many blocks": ("retrofit {stock} {tmp}/new --num-blocks 99", ["num_blocks: 99", "between 1 and 8"]),
    "zero blocks": ("retrofit {stock} {tmp}/new --num-blocks 0", ["num_blocks: 0"]),
    "unknown connection": ("retrofit {stock} {tmp}/new --connection moda", ["'moda'", "'attn_res'"]),
    "not an assignment": ("retrofit {stock} {tmp}/new --set query", ["--set query", "FIELD=VALUE"]),
    "unknown field": ("retrofit {stock} {tmp}/new --set quary=input", ["quary", "query"]),
    "inexact field": ("retrofit {stock} {tmp}/new --set read_scale=mean", ["'mean' does not reproduce the host"]),
    "source is not there": ("retrofit ./nowhere {tmp}/new", ["./nowhere: no such folder"]),
    "source not on the Hub": ("retrofit some/model {tmp}/new", ["some/model", "Hub"]),
    "source truncated": ("retrofit {cut} {tmp}/new", ["cut short"]),
    "output exists": ("retrofit {stock} {out}", ["not empty", "--overwrite"]),
    "output in source": ("retrofit {stock} {stock}/new", ["must not contain the source"]),
    "retrofitted twice": ("retrofit {out} {tmp}/new", ["already"]),
    "verify swapped": ("verify {out} {stock}", ["already"]),
    "verify nothing": ("verify {stock} {tmp}/nowhere", ["no such folder"]),
    "verify truncated": ("verify {stock} {cut}", ["cut short"]),
    "verify without text": ("verify {stock} {out} --text {tmp}/nowhere.txt", ["nowhere.txt"]),
    "verify binary text": ("verify {stock} {out} --text {stock}/model.safetensors", ["not UTF-8"]),
    "verify empty text": ("verify {stock} {out} --text {tmp}/empty.txt", ["0 tokens are too few"]),
    "verify dtype": ("verify {stock} {out} --dtype int8", ["'int8'", "bfloat16"]),
    "verify device": ("verify {stock} {out} --device toaster", ["'toaster'"]),
    "verify no tokens": ("verify {stock} {out} --max-new-tokens 0", ["max_new_tokens"]),
    "verify many tokens": ("verify {stock} {out} --max-new-tokens 99999", ["max_new_tokens: 99999", "4096"]),
    "verify without values": ("verify {stock} {out} --device meta", ["device: 'meta'", "cannot run a model"]),
    "verify with a directory": ("verify {stock} {out} --text {tmp}", ["Is a directory"]),
    "source of nobody": ("retrofit ~nosuchuser/x {tmp}/new", ["~nosuchuser/x: no such user"]),
    "output of nobody": ("retrofit {stock} ~nosuchuser/x", ["~nosuchuser/x: no such user"]),
    "text of nobody": ("verify {stock} {out} --text ~nosuchuser/x", ["~nosuchuser/x: no such user"]),
    "output name too long": ("retrofit {stock} {tmp}/" + "x" * 300, ["File name too long"]),
    "both are stock": ("verify {stock} {stock}", ["not a depth attention checkpoint"]),
    "restore stock": ("restore {stock} {tmp}/new", ["not a depth attention checkpoint"]),
    "restore truncated": ("restore {cut} {tmp}/new", ["cut short"]),
}


@pytest.mark.parametrize("arguments, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_give_one_line_and_exit_code_2(arguments, named, stock, retrofitted, tmp_path, command):
    (tmp_path / "empty.txt").write_text("")
    paths = {"stock": stock, "out": retrofitted, "tmp": tmp_path, "cut": ""}
    if "{cut}" in arguments:
        paths["cut"] = damaged(stock if arguments.startswith("retrofit") else retrofitted, tmp_path)
    code, printed, errors = command(*arguments.format(**paths).split())
    assert code == 2 and printed == "" and len(errors) == 1, errors
    assert errors[0].startswith("depthattn: error: ") and all(words in errors[0] for words in named), errors
    assert not (tmp_path / "new").exists()


def test_verify_of_an_index_without_metadata_is_a_mistake(tmp_path, command):
    sharded = save_stock(tmp_path / "sharded", max_shard_size="20KB")
    retrofit(sharded, tmp_path / "out")
    for folder in (sharded, tmp_path / "out"):
        index = folder / INDEX_FILE
        content = json.loads(index.read_text())
        index.write_text(json.dumps({"weight_map": content["weight_map"]}))
        code, _, errors = command("verify", sharded, tmp_path / "out")
        assert code == 2 and len(errors) == 1 and f"{index}: has no 'metadata'" in errors[0], errors
        index.write_text(json.dumps(content))
    assert command("verify", sharded, tmp_path / "out")[0] == 0


def test_verify_names_a_wrong_shape_of_either_side(stock, retrofitted, tmp_path, command):
    for side in (stock, retrofitted):
        changed = Path(shutil.copytree(side, tmp_path / f"changed-{side.name}"))
        for path in weights_of(changed):
            tensors = load_file(path)
            if "model.norm.weight" in tensors:
                save_file(tensors | {"model.norm.weight": torch.ones(7)}, path, metadata={"format": "pt"})
        code, _, errors = command("verify", *((changed, retrofitted) if side is stock else (stock, changed)))
        assert code == 2 and len(errors) == 1 and "model.norm.weight: [7], not [32]" in errors[0], errors


def test_restore_of_an_incomplete_model_is_a_mistake(retrofitted, tmp_path, command):
    for missing in ("model.layers.1.mlp.up_proj.weight", "model.depth_reads.query"):
        changed = Path(shutil.copytree(retrofitted, tmp_path / missing))
        index = changed / INDEX_FILE
        content = json.loads(index.read_text())
        del content["weight_map"][missing]
        index.write_text(json.dumps(content))
        code, _, errors = command("restore", changed, tmp_path / "new")
        assert code == 2 and len(errors) == 1 and "lacks" in errors[0] and missing in errors[0], errors
        assert not (tmp_path / "new").exists()


def test_folders_with_names_that_are_no_text(stock, tmp_path, command):
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff")
    code, _, errors = command("retrofit", stock, odd)
    assert code == 2 and len(errors) == 1 and "its name is not UTF-8 text" in errors[0], errors
    code, printed, errors = command("retrofit", stock, f"{odd}/out")
    assert (code, errors) == (0, []) and "\\udcff/out" in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"depthattn {hf_depthattn.__version__}\n"


def test_verify_of_another_model_is_a_mistake(retrofitted, tmp_path, command):
    other = save_stock(tmp_path / "other", "qwen3")
    code, _, errors = command("verify", other, retrofitted)
    assert code == 2 and len(errors) == 1 and "model_type" in errors[0]


def test_restore_of_a_trained_checkpoint_names_the_sites(retrofitted, tmp_path, command):
    trained = load(retrofitted)
    with torch.no_grad():
        trained.model.depth_reads.query[4, 0] = 1
    trained.save_pretrained(tmp_path / "trained")
    code, _, errors = command("restore", tmp_path / "trained", tmp_path / "new")
    assert code == 2 and len(errors) == 1 and "layers.2.attn_depth" in errors[0]


def test_no_traceback_from_the_process(stock, tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "hf_depthattn.cli.main", "retrofit", str(stock), str(tmp_path)]
    (tmp_path / "something").write_text("")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "not empty" in result.stderr


def test_interrupt_leaves_nothing(stock, tmp_path, command, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_depthattn.conversion.retrofit.write_shard", interrupt)
    code, _, errors = command("retrofit", stock, tmp_path / "new")
    assert code == 130 and len(errors) == 1 and os.listdir(tmp_path) == []


def test_progress_bar_on_request(stock, tmp_path, command):
    assert command("retrofit", stock, tmp_path / "quiet")[2] == []
    assert any("weights" in line for line in command("retrofit", stock, tmp_path / "loud", "--progress")[2])


def test_transformers_reports_as_before_afterwards(stock, tmp_path, command):
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    command("retrofit", stock, tmp_path / "out")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_help_speaks_of_every_option(capsys):
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    assert set(commands) == {"retrofit", "verify", "restore", "import", "export", "eval", "report", "select-slots"}
    for name, subparser in commands.items():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert "Exit codes" in printed
        assert all(
            action.help and action.option_strings[-1] in printed
            for action in subparser._actions[1:]
            if action.option_strings
        )


def test_the_config_has_the_options_and_no_other_fields_of_its_own():
    of_every_config = PreTrainedConfig.__dataclass_fields__.keys() | {"text_config"}
    assert DEPTH_OPTIONS.keys() == DepthAttnConfig.__dataclass_fields__.keys() - of_every_config
    assert all(f"        {name} (`" in DepthAttnConfig.__doc__ for name in DEPTH_OPTIONS)


def test_every_option_can_be_given_to_retrofit(command, tmp_path):
    stock = save_stock(tmp_path / "stock")
    for name in DEPTH_OPTIONS:
        default = option_default(name)
        value = "2" if default is None else str(default)
        flag = f"--{name.replace('_', '-')}"
        option = [flag, value] if DEPTH_OPTIONS[name].metavar else ["--set", f"{name}={value}"]
        _, _, errors = command("retrofit", stock, tmp_path / "stock" / "inside", *option)
        # The option is known: only the folder is wrong.
        assert len(errors) == 1 and "must not contain the source" in errors[0]


def test_real_checkpoint(depthattn_data, tmp_path, command):
    source = depthattn_data / "stories260K" / "hf"
    assert command("retrofit", source, tmp_path / "out")[0] == 0
    code, printed, _ = command(
        "verify", source, tmp_path / "out", "--text", depthattn_data / "wikitext2" / "valid.txt"
    )
    assert code == 0, printed
    assert command("restore", tmp_path / "out", tmp_path / "back")[0] == 0
    restored, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", source))
    # Each names the version of transformers that wrote it.
    assert restored.pop("transformers_version") and original.pop("transformers_version")
    assert restored == original


@pytest.mark.parametrize(
    "options",
    [["--set", "num_blocks=2"], ["--set", "overwrite=true"], ["--set", "query=input", "--set", "query=static"]],
)
def test_set_is_for_fields_without_an_option_and_once_each(options, tmp_path, capsys):
    assert main(["retrofit", str(tmp_path), str(tmp_path / "out"), *options]) == 2
    assert "--set" in capsys.readouterr().err
