"""Folders for flash-linear-attention: the inverse of the import, and a float64 oracle."""

import json
import math

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_import, edit
from safetensors.torch import load_file
from tiny_checkpoints import save_stock, save_tokenizer
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, DepthAttnModel, retrofit
from hf_depthattn.cli.main import main
from hf_depthattn.conversion.export_fla import export_fla
from hf_depthattn.conversion.import_checkpoint import import_checkpoint
from hf_depthattn.errors import UserError

MODELS = {
    "llama": {"tied": True},
    "mistral": {"window": 4},
    "qwen2, window": {"qkv_bias": True, "window": 3},
    "qwen3": {"qk_norm": True, "eps": {"block": 1e-3, "qk": 1e-5}},
    "qwen3, bias": {"qk_norm": True, "qkv_bias": True, "eps": {"qk": 1e-5}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_export_undoes_import(fields, dtype, tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4, **fields))
    edit(source, {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()})
    import_checkpoint(source, tmp_path / "imported")
    report = export_fla(tmp_path / "imported", tmp_path / "back")
    theirs, back = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert theirs.keys() == back.keys() and report.num_tensors == len(back) and not report.scaled
    assert all(back[name].dtype == dtype and torch.equal(theirs[name], back[name]) for name in theirs)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert all(after[name] == value for name, value in before.items() if name in after)
    # Fields that are absent change no logits.
    assert before.keys() - after.keys() <= {
        "elementwise_affine",
        "fuse_norm",
        "fuse_swiglu",
        "torch_dtype",
        "transformers_version",
        "use_l2warp",
    }


def test_queries_that_bfloat16_would_round_stay_in_float32(tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    theirs = load_file(source / "model.safetensors")
    edit(source, {name: value.bfloat16() for name, value in theirs.items() if "res_" not in name})
    import_checkpoint(source, tmp_path / "imported")
    export_fla(tmp_path / "imported", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back["lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(back[name], value) for name, value in theirs.items() if "res_" in name)


def test_a_bias_of_the_output_projection_is_refused_unless_it_is_zero(tmp_path):
    model = ForeignModel(sublayers_per_block=4, qk_norm=True, qkv_bias=True)
    import_checkpoint(foreign_checkpoints.fla(tmp_path / "source", model), tmp_path / "ours")
    name = "model.layers.1.self_attn.o_proj.bias"
    edit(tmp_path / "ours", {name: torch.eye(24)[0]})
    with pytest.raises(UserError, match=f"attention_bias is true and {name} is not zero"):
        export_fla(tmp_path / "ours", tmp_path / "out")


def test_projections_are_scaled_for_the_epsilon_of_the_library(tmp_path):
    """A Qwen3 of ours has one epsilon everywhere; the library computes norms of queries and keys with 1e-5."""
    eps = 1e-3
    model = ForeignModel(sublayers_per_block=4, qk_norm=True, eps={"block": eps})
    import_checkpoint(foreign_checkpoints.fla(tmp_path / "source", model), tmp_path / "ours")
    edit(tmp_path / "ours", norm_eps_overrides=None)
    report = export_fla(tmp_path / "ours", tmp_path / "out")
    assert len(report.scaled) == 6 and "6 tensors, first model.layers.0.attn.k_proj.weight" in str(report)
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.attn.q_proj.weight"]
    assert torch.equal(found, (model.tensor("1.q").double() * math.sqrt(1e-5 / eps)).float())
    # Our model with its own epsilon computes what the exported one computes with the library's.
    (tmp_path / "check").mkdir()
    scaled = ForeignModel(sublayers_per_block=4, qk_norm=True, eps={"block": eps, "qk": 1e-5})
    scaled.tensor = lambda name, plain=scaled.tensor: (
        (plain(name).double() * math.sqrt(1e-5 / eps)).float() if name[1:] in (".q", ".k") else plain(name)
    )
    check_import(tmp_path / "out", scaled)
    assert torch.allclose(scaled.logits(), model.logits(), rtol=1e-4, atol=1e-5)


def attn_res(folder, model_type="llama", **fields):
    """Save one of our models."""
    host = tiny_host_config(model_type, **fields.pop("host", {}))
    options = {"sublayers_per_block": 2} | fields
    DepthAttnForCausalLM(DepthAttnConfig(text_config=host, **options)).save_pretrained(folder)
    return folder


# label -> arguments of `attn_res`, what the message says
REFUSED = {
    "connection": ({"connection": "rezero", "sublayers_per_block": None}, ["connection is 'rezero'"]),
    "MoDA": ({"depth_kv": "attention"}, ["depth_kv is 'attention'"]),
    "host": ({"model_type": "gemma2"}, ["host is 'gemma2'"]),
    "odd blocks": ({"sublayers_per_block": 3}, ["sublayers_per_block is 3", "1 or an even number"]),
    "sums": ({"read_scale": "sum"}, ["read_scale is 'sum'"]),
    "heads": ({"num_depth_heads": 4}, ["num_depth_heads is 4"]),
    "window": ({"depth_window": 2}, ["depth_window is 2"]),
    "epsilon": ({"depth_norm_eps": 1e-3}, ["depth_norm_eps is 0.001"]),
    "epsilon of one norm": ({"norm_eps_overrides": {"norm": 1e-3}}, ["norm_eps_overrides has 'norm'"]),
    "value residual": ({"value_residual": True}, ["value_residual is True"]),
    "activation": ({"host": {"hidden_act": "gelu"}}, ["hidden_act is 'gelu'"]),
    "rotation": (
        {"host": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        ["rope_parameters"],
    ),
    "size of heads": ({"host": {"head_dim": 16}}, ["head_dim is 16"]),
    "biases": ({"host": {"attention_bias": True}}, ["attention_bias or mlp_bias"]),
    "windows in some layers": (
        {"model_type": "qwen3", "host": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}},
        ["some layers have a sliding window"],
    ),
}


@pytest.mark.parametrize("fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_the_library_does_not_have_is_refused_in_one_line(fields, words, tmp_path):
    with pytest.raises(UserError) as error:
        export_fla(attn_res(tmp_path / "model", **fields), tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert "cannot be exported" in message and not (tmp_path / "out").exists()


def test_other_checkpoints_are_refused(tmp_path):
    stock = save_stock(tmp_path / "stock")
    with pytest.raises(UserError, match="is not a depth attention checkpoint"):
        export_fla(stock, tmp_path / "out")
    retrofit(stock, tmp_path / "retrofitted")
    with pytest.raises(UserError, match="read_scale is 'sum'"):
        export_fla(tmp_path / "retrofitted", tmp_path / "out")
    DepthAttnModel(DepthAttnConfig.attn_res(tiny_host_config("llama"))).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="causal language models only"):
        export_fla(tmp_path / "base", tmp_path / "out")


def test_command(tmp_path, capfd):
    model = attn_res(tmp_path / "model")
    save_tokenizer(model)
    assert main(["export", str(model), str(tmp_path / "out"), "--format", "fla"]) == 0
    assert "attnres_block_size 2" in capfd.readouterr().out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert not any(name.endswith(".py") for name in files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import fla" in card and "custom_code" not in card
    assert main(["export", str(model), str(tmp_path / "out"), "--format", "olmo"]) == 2
