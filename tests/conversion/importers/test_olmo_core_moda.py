"""MoDA of OLMo-core, against a float64 oracle."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_golden, check_import, check_refused, edit

# label -> fields of the model, host, first logits of the last token
CASES = {
    "pre-norm": ({"moda": "pre"}, "llama", [-1.6149895431, -0.361411022817, 1.04156450961]),
    "post-norm": ({"moda": "post"}, "llama", [3.21527725993, 2.38062020491, -1.41506994156]),
    "pre-norm, other epsilons": (
        {"moda": "pre", "qk_norm": True, "eps": {"block": 1e-4, "qk": 1e-6, "final": 1e-3}},
        "qwen3",
        [-0.330959883185, 2.02339763354, -0.286748977978],
    ),
    "post-norm, norms of keys": (
        {"moda": "post", "qk_norm": True},
        "qwen3",
        [-2.98505362473, -3.51287944799, 0.695781563583],
    ),
}


@pytest.mark.parametrize("fields, host, golden", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_oracle(fields, host, golden, tmp_path):
    model = ForeignModel(**fields)
    check_golden(model.logits(), golden)
    report = check_import(foreign_checkpoints.olmo_core(tmp_path / "source", model), model)
    assert (report.format, report.model_type) == ("olmo-core-moda", host)


def test_projections_that_no_layer_reads_are_left_out(tmp_path):
    model = ForeignModel(moda="pre")
    source = foreign_checkpoints.olmo_core(tmp_path / "source", model)
    last = "blocks.2.feed_forward.kv_proj.weight"
    edit(source, {last: torch.ones(24, 24)}, model__block_overrides=None)
    assert check_import(source, model).dropped == {last: "no layer reads its slot"}


def test_the_last_block_may_only_leave_its_projections_out(tmp_path):
    source = foreign_checkpoints.olmo_core(tmp_path / "source", ForeignModel(moda="pre"))
    # `layer_norm` and others are missing.
    edit(source, model__block_overrides={"2": {"name": "moda", "moda_skip_ffn_kv": True}})
    check_refused(source, tmp_path / "out", "model.block_overrides", "all alike")
    edit(source, model__block_overrides={"1": {"moda_skip_ffn_kv": True}})
    check_refused(source, tmp_path / "out", "model.block_overrides", "all alike")


PROJECTION = "blocks.1.feed_forward.kv_proj.weight"
# label -> tensors, fields, what the message says
REFUSED = {
    "scale": ({}, {"model__block__moda__attention_scale": 0.5}, ["moda.attention_scale is 0.5"]),
    "no projections": ({}, {"model__block__moda__extra_ffn_kv_proj": False}, ["moda.extra_ffn_kv_proj is False"]),
    "projections of attention": ({}, {"model__block__moda__extra_attn_kv_proj": True}, ["extra_attn_kv_proj is True"]),
    "keys without norm": ({}, {"model__block__moda__cache_post_norm_k": False}, ["cache_post_norm_k is False"]),
    "bias": ({"blocks.1.feed_forward.kv_proj.bias": torch.ones(24)}, {}, ["blocks.1.feed_forward.kv_proj.bias"]),
    "no projection": ({PROJECTION: None}, {}, [f"lacks the tensor '{PROJECTION}'"]),
    "few rows": ({PROJECTION: torch.ones(20, 24)}, {}, [PROJECTION, "[20, 24]", "24 rows"]),
    "many rows": ({PROJECTION: torch.ones(28, 24)}, {}, [PROJECTION, "[28, 24]", "24 rows"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.olmo_core(tmp_path / "source", ForeignModel(moda="pre", qk_norm=True))
    fields = fields | {"model__block_overrides": None}
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
