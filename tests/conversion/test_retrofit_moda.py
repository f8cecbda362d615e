"""Retrofit to MoDA, alone and with AttnRes: the same logits and greedy text, what is on disk, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moda_models import COMBINATIONS
from model_checks import is_depth_key, relative_max_error
from processes import run_python
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CHECKPOINTS, edit_config, load, logits, save_sparse, save_stock, weights_of
from tiny_hosts import NUM_LAYERS, random_ids, tiny_host_config, tiny_stock_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, MixtralForSequenceClassification

from hf_depthattn.checkpoints.checkpoint_files import TensorEntry, read_weight_files
from hf_depthattn.cli.main import main
from hf_depthattn.conversion import depth_shards
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify.verify import verify

DEMO_CHECKPOINT = ROOT / "examples" / "demo_model" / "checkpoint"
MODA = {"connection": "residual", "depth_kv": "attention+mlp"}
every_combination = pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


def depth_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The depth tensors of a checkpoint."""
    tensors = {}
    for path in weights_of(folder):
        tensors |= {name: tensor for name, tensor in load_file(path).items() if is_depth_key(name)}
    return tensors


def change(folder: Path, name: str, value: float, *, row: int = 0) -> None:
    """Set the first number of a row of a tensor; a vector has one row."""
    tensors = load_file(weights_of(folder)[-1])
    torch.atleast_2d(tensors[name])[row, 0] = value
    save_file(tensors, weights_of(folder)[-1], metadata={"format": "pt"})


# --- exactness ---


@every_combination
@pytest.mark.parametrize("model_type, max_shard_size", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_retrofit_keeps_logits_and_greedy_text_and_restore_gives_the_checkpoint_back(
    model_type, max_shard_size, fields, tmp_path
):
    source = save_stock(tmp_path / "stock", model_type, max_shard_size=max_shard_size, tokenizer=False)
    report = retrofit(source, tmp_path / "out", depth_kv="attention+mlp", **fields)
    host, model = load(source), load(tmp_path / "out")
    assert model.config.depth_kv == "attention+mlp" and model.config.depth_gate == "head"
    ids = random_ids(2, 21)
    expected = logits(host, ids)
    assert relative_max_error(logits(model, ids), expected) <= 1e-5
    assert torch.equal(*(m.generate(ids, max_new_tokens=8, do_sample=False) for m in (host, model)))
    added = {name: parameter for name, parameter in model.named_parameters() if is_depth_key(name)}
    assert report.num_depth_parameters == sum(parameter.numel() for parameter in added.values())
    in_projections = [parameter.numel() for name, parameter in added.items() if ".mlp_depth_kv." in name]
    assert report.num_projection_parameters == sum(in_projections) > 0
    assert report.num_slots == max(model.config.depth_slot_plan.num_read)

    # Not a copy of the host: open gates are seen.
    with torch.no_grad():
        for name, parameter in added.items():
            parameter.fill_(0.5 if name.endswith(".gate") else 0.1)
    assert relative_max_error(logits(model, ids), expected) > 1e-3

    report = restore(tmp_path / "out", tmp_path / "restored")
    assert report.architecture == type(host).__name__ and report.num_depth_tensors == len(added)
    assert torch.equal(logits(load(tmp_path / "restored"), ids), expected)
    assert [path.stat().st_ino for path in weights_of(tmp_path / "restored")] == [
        path.stat().st_ino for path in weights_of(source)
    ]
    assert (tmp_path / "restored" / "config.json").read_text() == (source / "config.json").read_text()


OPTIONS = {
    "attention slots": {"depth_kv": "attention"},
    "gate given": {"depth_gate": "head"},
    "unrotated keys": {"depth_key_rope": "none"},
    "reader's norm": {"depth_key_norm": "reader"},
    "biases": {"depth_kv_bias": True},
    "newest slots": {"num_depth_slots": 2},
    "chosen slots": {"depth_slots": [[], [0], [0, 3]]},
    "Full AttnRes": {"connection": "attn_res", "sublayers_per_block": 1},
    "input query": {"connection": "attn_res", "query": "input"},
}


@pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_keep_the_logits(fields, tmp_path):
    source = save_stock(tmp_path / "stock", "qwen3", tokenizer=False)
    retrofit(source, tmp_path / "out", **{**MODA, **fields})
    host, model = load(source), load(tmp_path / "out")
    ids = random_ids(1, 19)
    assert relative_max_error(logits(model, ids), logits(host, ids)) <= 1e-5
    for field, value in fields.items():
        assert getattr(model.config, field) == value
    assert all(not bias.any() for name, bias in model.named_parameters() if name.endswith("bias"))
    restore(tmp_path / "out", tmp_path / "restored")
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(host, ids))


@every_combination
@pytest.mark.parametrize("name", ["stories260K", "demo model"])
def test_real_checkpoints_keep_logits_and_greedy_text(name, fields, request, tmp_path):
    source = DEMO_CHECKPOINT
    if name == "stories260K":
        source = request.getfixturevalue("depthattn_data") / "stories260K" / "hf"
    retrofit(source, tmp_path / "out", depth_kv="attention+mlp", **fields)
    host, model = (load(folder).float() for folder in (source, tmp_path / "out"))
    prompt = "Once upon a time, there was a" if name == "stories260K" else "import os\nimport sys\n\ndef main("
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(prompt, return_tensors="pt").input_ids
    assert relative_max_error(logits(model, ids), logits(host, ids)) <= 1e-5
    assert torch.equal(*(m.generate(ids, max_new_tokens=40, do_sample=False) for m in (host, model)))
    report = verify(source, tmp_path / "out")
    assert report.ok, report


@every_combination
def test_other_heads_keep_their_outputs(fields, tmp_path):
    """Mixtral, whose renamings touch `.mlp`, as a base model and as a classifier."""
    config = tiny_host_config("mixtral", num_labels=3)
    MixtralForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    ids = random_ids(2, 9)
    for name, auto_class in {"classifier": AutoModelForSequenceClassification, "base": AutoModel}.items():
        retrofit(tmp_path / name, tmp_path / f"{name}-out", depth_kv="attention+mlp", **fields)
        host, model = (load(tmp_path / folder, auto_class) for folder in (name, f"{name}-out"))
        with torch.no_grad():
            assert relative_max_error(model(ids)[0], host(ids)[0]) <= 1e-5
        prefix = "model." if name == "classifier" else ""
        assert f"{prefix}layers.0.mlp_depth_kv.k_proj.weight" in depth_tensors(tmp_path / f"{name}-out")
        model.save_pretrained(tmp_path / f"{name}-saved")
        assert depth_tensors(tmp_path / f"{name}-saved").keys() == depth_tensors(tmp_path / f"{name}-out").keys()


# --- what is on disk ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_are_float32_zeros_and_projections_have_the_dtype_of_the_weights(dtype, tmp_path):
    config = {"hidden_size": 128, "initializer_range": 0.03}
    tiny_stock_model("llama", dtype, **config).save_pretrained(tmp_path / "stock")
    retrofit(tmp_path / "stock", tmp_path / "out", **MODA)
    tensors = depth_tensors(tmp_path / "out")
    layers = [f"model.layers.{layer}" for layer in range(NUM_LAYERS)]
    projections = {f"{layer}.mlp_depth_kv.{kind}.weight" for layer in layers[:-1] for kind in ("k_proj", "v_proj")}
    assert tensors.keys() == projections | {f"{layer}.attn_depth_kv.gate" for layer in layers[1:]}
    for name, tensor in tensors.items():
        assert tensor.dtype == (dtype if name in projections else torch.float32), name
        assert name in projections or not tensor.any(), name
        assert name not in projections or abs(tensor.float().std().item() / 0.03 - 1) < 0.1, name
    drawn = [tensors[name] for name in sorted(projections)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    model = load(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(".gate") else dtype), name


def test_projections_are_the_same_in_every_retrofit_that_has_them(stock, tmp_path):
    variants = {"first": {}, "again": {}, "with AttnRes": {"connection": "attn_res"}, "window": {"num_depth_slots": 3}}
    torch.manual_seed(1)
    drawn = []
    for name, fields in variants.items():
        retrofit(stock, tmp_path / name, **{**MODA, **fields})
        drawn.append({key: value for key, value in depth_tensors(tmp_path / name).items() if "mlp_depth_kv" in key})
    for tensors in drawn[1:]:
        assert tensors.keys() == drawn[0].keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in drawn[0].items())


def test_projections_drawn_in_pieces_are_complete(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(depth_shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(depth_shards, "MAX_SHARD_BYTES", 3000)
    retrofit(stock, tmp_path / "out", **MODA)
    assert len(weights_of(tmp_path / "out")) > 2
    for name, tensor in depth_tensors(tmp_path / "out").items():
        assert name.endswith(".gate") or (tensor.ne(0).all(dim=-1).all() and len(tensor.unique()) > 200), name
    load(tmp_path / "out")


def test_the_dtype_is_that_of_most_weights():
    def entry(dtype, num_bytes):
        return TensorEntry(dtype, (), 0, num_bytes)

    assert depth_shards.weights_dtype([entry("F32", 10), entry("BF16", 90), entry("I64", 900)]) == torch.bfloat16
    assert depth_shards.weights_dtype([entry("U8", 10)]) == torch.float32


_RETROFIT_AND_MEASURE = """
import resource, sys
from hf_depthattn.conversion.retrofit import retrofit
retrofit(sys.argv[1], sys.argv[2], connection="residual", depth_kv="attention+mlp", num_depth_slots=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = retrofit(sys.argv[3], sys.argv[4], connection="residual", depth_kv="attention+mlp")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.bytes_written)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_projections(stock, tmp_path):
    """A retrofit of a tiny model has gone before: what it loads and allocates is there."""
    config = tiny_host_config("llama", hidden_size=8192, num_key_value_heads=2, head_dim=2048, num_hidden_layers=2)
    source = save_sparse(tmp_path / "large", config)
    arguments = [str(folder) for folder in (stock, tmp_path / "small-out", source, tmp_path / "out")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, "-c", _RETROFIT_AND_MEASURE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kilobytes, bytes_written = map(int, result.stdout.split())
    # Two projections in bfloat16. Measured: 1.4 MB, and 239 MB when each is drawn at once.
    assert bytes_written > 2 * 2 * 4096 * 8192 and grown_kilobytes < 50_000, result.stdout


def test_loads_with_remote_code_where_the_package_is_absent(stock, tmp_path):
    retrofit(stock, tmp_path / "out", depth_kv="attention+mlp")
    ids = random_ids(1, 16)
    save_file({"ids": ids, "logits": logits(load(stock), ids)}, tmp_path / "reference.st")
    code = """
import sys
sys.modules["hf_depthattn"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
reference = load_file("reference.st")
model, info = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True, output_loading_info=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not info["missing_keys"] and not info["unexpected_keys"], info
error = (model(reference["ids"]).logits - reference["logits"]).abs().max() / reference["logits"].abs().max()
assert error <= 1e-5, error
"""
    result = run_python("-c", code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr


# --- the report and the card ---


def test_report_and_card_say_what_is_new(stock, tmp_path):
    report = retrofit(stock, tmp_path / "moda", **MODA)
    assert report.connection == "plain residual sums"
    words = "Mixture-of-Depths Attention (slots of attention and MLP sublayers, one gate per head)"
    assert report.depth_kv == words and words in str(report)
    assert report.num_slots == 4 and "at most 4 in a layer" in str(report)
    # Two gates of 4 heads; 2 layers x 2 projections of 32 to 2 heads x 8.
    assert (report.num_depth_parameters, report.num_projection_parameters) == (8 + 2048, 2048)
    assert "8, float32, and 2,048 in projections" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["depth_kv"] == words
    card = (tmp_path / "moda" / "README.md").read_text()
    for text in (words, "2,056 depth parameters", "- mixture-of-depths-attention", "2603.15619", "the gates are zero"):
        assert text in card, text
    assert "attention-residuals" not in card and "read_scale" not in card and "2603.15031" not in card

    report = retrofit(stock, tmp_path / "both", depth_kv="attention", num_depth_slots=1, num_blocks=3)
    assert "the newest 1" in report.depth_kv and report.num_projection_parameters == 0
    card = (tmp_path / "both" / "README.md").read_text()
    assert "Block Attention Residuals (2 sublayers per block) and Mixture-of-Depths Attention" in card
    assert "2603.15031" in card and "2603.15619" in card
    assert "the queries are zero and the gates are zero" in card

    report = retrofit(stock, tmp_path / "control", connection="residual")
    assert report.depth_kv is None and report.num_slots == 0 and "depth slots" not in str(report)
    assert "restores the source at any time" in (tmp_path / "control" / "README.md").read_text()


def test_committed_model_card_is_what_retrofit_writes(tmp_path):
    retrofit(DEMO_CHECKPOINT, tmp_path / "demo-attn-res-moda", num_blocks=8, depth_kv="attention+mlp")
    card = (tmp_path / "demo-attn-res-moda" / "README.md").read_text(encoding="utf-8")
    assert card == (ROOT / "model_cards" / "demo-attn-res-moda.md").read_text(encoding="utf-8")


# --- refusals ---

# label -> arguments, what the message says
BAD_ARGUMENTS = {
    "no gate": ({**MODA, "depth_gate": None}, ["depth_gate: None", "does not reproduce the host", "'head'"]),
    "gate none": ({**MODA, "depth_gate": "none"}, ["depth_gate: 'none'", "does not reproduce the host", "'head'"]),
    "unknown gate": ({**MODA, "depth_gate": "channel"}, ["depth_gate: 'channel'", "'head'"]),
    "unknown writers": ({"depth_kv": "mlp"}, ["depth_kv: 'mlp'", "'attention+mlp'"]),
    "unknown rotation": ({**MODA, "depth_key_rope": "yes"}, ["depth_key_rope: 'yes'", "'same_position'"]),
    "no slots": ({**MODA, "num_depth_slots": 0}, ["num_depth_slots: 0", "at least 1"]),
    "gate alone": ({"depth_gate": "head"}, ["depth_gate: 'head' has no effect without depth_kv", "'attention+mlp'"]),
    "slots alone": ({"num_depth_slots": 2}, ["num_depth_slots: 2 has no effect without depth_kv"]),
    "slot of a later layer": (
        {**MODA, "depth_slots": [[], [2], []]},
        ["depth_slots: layer 1 cannot read slot 2", "allowed are 0, 1"],
    ),
    "post-norm": (
        {"connection": "residual", "norm_position": "post"},
        ["norm_position: 'post' does not reproduce the host", "only 'host'"],
    ),
    "post-norm MoDA": ({**MODA, "norm_position": "post"}, ["norm_position: 'post' does not reproduce the host"]),
}


@pytest.mark.parametrize("arguments, named", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused_in_one_line(arguments, named, stock, tmp_path):
    with pytest.raises(UserError) as error:
        retrofit(stock, tmp_path / "out", **arguments)
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in named), message
    assert os.listdir(tmp_path) == []


def test_hosts_without_moda_are_refused_with_the_reason(tmp_path):
    source = save_stock(tmp_path / "stock", "diffllama", tokenizer=False)
    with pytest.raises(UserError, match=r"'diffllama'.* difference of two softmaxes"):
        retrofit(source, tmp_path / "out", **MODA)
    retrofit(source, tmp_path / "out")


# --- the command ---


@every_combination
def test_retrofit_verify_restore_from_the_shell(fields, stock, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    connection = ["--connection", fields["connection"]]
    options = ["--depth-kv", "attention+mlp", "--depth-gate", "head", "--depth-key-rope", "none"]
    options += ["--depth-key-norm", "reader", "--num-depth-slots", "3"]
    assert main(["retrofit", str(stock), str(out), *connection, *options]) == 0
    assert "Mixture-of-Depths Attention" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    chosen = ("depth_kv", "depth_gate", "depth_key_rope", "depth_key_norm", "num_depth_slots")
    assert [config[name] for name in chosen] == ["attention+mlp", "head", "none", "reader", 3]
    assert main(["verify", str(stock), str(out)]) == 0
    assert main(["restore", str(out), str(back)]) == 0
    load(back)
    change(out, "model.layers.2.attn_depth_kv.gate", 0.5)
    assert main(["verify", str(stock), str(out)]) == 1
    capsys.readouterr()
    assert main(["restore", str(out), str(tmp_path / "new")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "(layers.2.attn_depth_kv)" in errors[0]


# label -> options, words of the message
MISTAKES = {
    "gate none": ("--depth-kv attention --depth-gate none", ["depth_gate: 'none'", "only 'head'"]),
    "gate alone": ("--depth-gate head", ["depth_gate: 'head' has no effect without depth_kv"]),
    "unknown writers": ("--depth-kv moda", ["depth_kv: 'moda'", "'attention', 'attention+mlp'"]),
    "not a number": ("--depth-kv attention --num-depth-slots all", ["--num-depth-slots", "'all'"]),
    "has an option": ("--set depth_kv=attention", ["--set depth_kv: must be one of"]),
    "post-norm": ("--connection residual --set norm_position=post", ["norm_position: 'post'"]),
}


@pytest.mark.parametrize("options, named", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_give_one_line_and_exit_code_2(options, named, stock, tmp_path, capfd):
    capfd.readouterr()
    assert main(["retrofit", str(stock), str(tmp_path / "new"), *options.split()]) == 2
    printed, errors = capfd.readouterr()
    assert printed == "" and errors.count("\n") == 1 and all(words in errors for words in named), errors
    assert not (tmp_path / "new").exists()


# --- restore ---


def test_restore_names_gates_that_have_moved_and_ignores_projections(stock, tmp_path):
    retrofit(stock, tmp_path / "out", depth_kv="attention+mlp")
    change(tmp_path / "out", "model.layers.0.mlp_depth_kv.v_proj.weight", 7.0)
    change(tmp_path / "out", "model.depth_reads.key_norm", 7.0, row=1)
    restore(tmp_path / "out", tmp_path / "restored")
    assert not any(is_depth_key(name) for name in read_weight_files(tmp_path / "restored").weight_map)
    change(tmp_path / "out", "model.layers.1.attn_depth_kv.gate", float("nan"))
    change(tmp_path / "out", "model.depth_reads.query", 1e-8, row=5)
    named = re.escape("2 of 9 depth modules have been trained (layers.1.attn_depth_kv, layers.2.mlp_depth)")
    with pytest.raises(UserError, match=named):
        restore(tmp_path / "out", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "fields, named",
    [({"depth_gate": None}, "depth_gate is None"), ({"norm_position": "post"}, "norm_position is 'post'")],
)
def test_restore_refuses_what_is_not_the_host(fields, named, stock, tmp_path):
    retrofit(stock, tmp_path / "out", **MODA)
    edit_config(tmp_path / "out", **fields)
    with pytest.raises(UserError, match=named):
        restore(tmp_path / "out", tmp_path / "restored")


def test_restore_takes_depth_tensors_out_of_mixed_shards(stock, tmp_path):
    retrofit(stock, tmp_path / "out", depth_kv="attention+mlp")
    load(tmp_path / "out").save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    restore(tmp_path / "saved", tmp_path / "restored")
    ids = random_ids(1, 15)
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(load(stock), ids))
