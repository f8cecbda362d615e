"""Checkpoints of flash-linear-attention, against a float64 oracle."""

import json

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_import, check_refused, edit, load_complete

from hf_depthattn.conversion.import_checkpoint import import_checkpoint

# label -> fields of the model, host, first logits of the last token. The library's norms of queries and keys have the
# epsilon 1e-5, those of the other norms is in the config.
CASES = {
    "llama, last block shorter": (
        {"sublayers_per_block": 4},
        "llama",
        [-0.449396909116, 0.82812863095, -0.397279090204],
    ),
    "llama, full": (
        {"sublayers_per_block": 1, "tied": True},
        "llama",
        [-0.734255795944, -3.09904664396, 0.188770027972],
    ),
    "llama, one block": ({"sublayers_per_block": 12}, "llama", [-2.52609451234, -0.674442562133, -1.67054896975]),
    "mistral": ({"sublayers_per_block": 2, "window": 4}, "mistral", [0.63030017623, 0.205624855445, 0.812452305253]),
    "qwen2": (
        {"sublayers_per_block": 6, "qkv_bias": True},
        "qwen2",
        [-0.476340165999, -0.78926765012, -3.60340822691],
    ),
    "qwen2, window": (
        {"sublayers_per_block": 4, "qkv_bias": True, "window": 3},
        "qwen2",
        [0.129094574169, -1.24398906247, -2.78057928413],
    ),
    "qwen3": (
        {"sublayers_per_block": 4, "qk_norm": True, "eps": {"block": 1e-3, "qk": 1e-5}},
        "qwen3",
        [-2.63698936481, 0.518955985998, 0.438283919277],
    ),
    "qwen3, bias and window": (
        {"sublayers_per_block": 4, "qk_norm": True, "qkv_bias": True, "window": 4, "eps": {"qk": 1e-5}},
        "qwen3",
        [-1.43757478829, -0.0847629447665, -1.08612288988],
    ),
}


@pytest.mark.parametrize("fields, host, golden", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_oracle(fields, host, golden, tmp_path):
    model = ForeignModel(**fields)
    report = check_import(foreign_checkpoints.fla(tmp_path / "source", model), model, golden)
    assert (report.format, report.model_type) == ("fla", host)
    assert not report.dropped and not report.notes


def test_queries_in_bfloat16_become_float32_without_rounding(tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    query = torch.linspace(-1, 1, 24).bfloat16()[None]
    edit(source, {"model.layers.2.mlp_res_proj.weight": query})
    import_checkpoint(source, tmp_path / "out")
    reads = load_complete(tmp_path / "out").model.depth_reads
    assert reads.query.dtype == torch.float32 and torch.equal(reads.query[5], query[0].float())


def test_defaults_of_the_library_are_filled_in(tmp_path):
    model = ForeignModel(sublayers_per_block=2, intermediate_size=256, num_kv_heads=4)
    source = foreign_checkpoints.fla(tmp_path / "source", model)
    config = json.loads((source / "config.json").read_text())
    # 256 ceil(int(24 * 4 * 2 / 3) / 256) = 256; as many heads of keys as of queries; epsilon 1e-6.
    for name in ("intermediate_size", "norm_eps", "num_kv_heads", "hidden_act", "qk_norm", "qkv_bias"):
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    check_import(source, model)


QUERY = "model.layers.1.attn_res_proj.weight"
# label -> tensors, fields, what the message says
REFUSED = {
    "another model": ({}, {"model_type": "gla"}, ["model_type 'gla'", "'transformer'"]),
    "without AttnRes": ({}, {"attnres_block_size": None}, ["attnres_block_size is null"]),
    "no number": ({}, {"attnres_block_size": "4"}, ["attnres_block_size is '4'", "positive integer"]),
    "activation": ({}, {"hidden_act": "powlu"}, ["hidden_act is 'powlu'", "'swish' or 'silu'"]),
    "new field": ({}, {"attnres_topk": 2}, ["attnres_topk=2", "cannot be imported"]),
    "no query": ({QUERY: None}, {}, [f"lacks the tensor '{QUERY}'"]),
    "query of another size": ({QUERY: torch.ones(1, 25)}, {}, [QUERY, "[1, 25]", "24"]),
    "a tensor too many": ({"model.layers.1.attn.gate.weight": torch.ones(2)}, {}, ["model.layers.1.attn.gate.weight"]),
    "no projection": ({"model.layers.3.mlp.up_proj.weight": None}, {}, ["lacks", "layers.3.mlp.up_proj.weight"]),
    "another size": ({}, {"vocab_size": 24}, ["other shapes", "[23, 24], not [24, 24]"]),
    "packed": ({"lm_head.weight": torch.ones(23, 24).to(torch.uint8)}, {}, ["lm_head.weight", "U8"]),
    "quantised": ({}, {"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "adapter": ({"model.layers.0.attn.q_proj.lora_A.weight": torch.ones(2)}, {}, ["adapter", "lora_A"]),
    "fewer layers": ({}, {"num_hidden_layers": 4}, ["model.layers.4."]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
