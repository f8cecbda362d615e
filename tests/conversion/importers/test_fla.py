"""Checkpoints of flash-linear-attention, against a float64 oracle."""

import json

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_golden, check_import, check_refused, edit, load_complete

from hf_depthattn.conversion.import_checkpoint import import_checkpoint

# label -> fields of the model, host, first logits of the last token. The library's norms of queries and keys have the
# epsilon 1e-5, those of the other norms is in the config.
CASES = {
    "llama, last block shorter": (
        {"sublayers_per_block": 4},
        "llama",
        [-1.06107892205, -0.896038962709, -0.408689470765],
    ),
    "llama, full": (
        {"sublayers_per_block": 1, "tied": True},
        "llama",
        [-0.612432618391, -2.8430333333, -0.185278649292],
    ),
    "llama, one block": ({"sublayers_per_block": 8}, "llama", [-0.728928180803, -0.573122011706, 0.00664295678356]),
    "mistral": ({"sublayers_per_block": 2, "window": 4}, "mistral", [0.831970037557, 2.16912351716, -0.0408780840264]),
    "qwen2": (
        {"sublayers_per_block": 6, "qkv_bias": True},
        "qwen2",
        [0.118419614279, -0.687559163893, -5.34613466669],
    ),
    "qwen2, window": (
        {"sublayers_per_block": 4, "qkv_bias": True, "window": 3},
        "qwen2",
        [-0.0995449952131, -2.9635780869, -0.332801140654],
    ),
    "qwen3": (
        {"sublayers_per_block": 4, "qk_norm": True, "eps": {"block": 1e-3, "qk": 1e-5}},
        "qwen3",
        [1.26872195033, 0.755822630241, -1.86722917169],
    ),
    "qwen3, bias and window": (
        {"sublayers_per_block": 4, "qk_norm": True, "qkv_bias": True, "window": 4, "eps": {"qk": 1e-5}},
        "qwen3",
        [-0.412886162212, 0.373084500294, -1.82012696421],
    ),
}


@pytest.mark.parametrize("fields, host, golden", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_oracle(fields, host, golden, tmp_path):
    model = ForeignModel(**fields)
    check_golden(model.logits(), golden)
    report = check_import(foreign_checkpoints.fla(tmp_path / "source", model), model)
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
    "no rotation": ({}, {"rope_theta": None}, ["rope_theta is None"]),
    "window": ({}, {"window_size": [4, 0]}, ["window_size is [4, 0]", "positive integer"]),
    "new field": ({}, {"attnres_topk": 2}, ["attnres_topk=2", "cannot be imported"]),
    "no query": ({QUERY: None}, {}, [f"lacks the tensor '{QUERY}'"]),
    "query of another size": ({QUERY: torch.ones(1, 25)}, {}, [QUERY, "[1, 25]", "24"]),
    "a tensor too many": ({"model.layers.1.attn.gate.weight": torch.ones(2)}, {}, ["model.layers.1.attn.gate.weight"]),
    "no projection": ({"model.layers.1.mlp.up_proj.weight": None}, {}, ["lacks", "layers.1.mlp.up_proj.weight"]),
    "another size": ({}, {"vocab_size": 24}, ["other shapes", "[23, 24], not [24, 24]"]),
    "packed": (
        {"lm_head.weight": torch.ones(23, 24).to(torch.uint8)},
        {},
        ["lm_head.weight", "U8", "Import the unquantised"],
    ),
    "quantised": ({}, {"quantization_config": {"bits": 4}}, ["quantization_config", "Import the unquantised"]),
    "adapter": ({"model.layers.0.attn.q_proj.lora_A.weight": torch.ones(2)}, {}, ["adapter", "lora_A"]),
    "fewer layers": ({}, {"num_hidden_layers": 2}, ["model.layers.2."]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
