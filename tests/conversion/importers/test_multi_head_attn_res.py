"""Multi-head and delta attention residuals, against a float64 oracle."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_golden, check_import, check_refused, edit

# label -> mode, number of blocks, fields of the model, host, first logits of the last token
CASES = {
    "full": ("full", 2, {"sublayers_per_block": 1}, "llama", [-1.55366610478, -1.16565116023, -0.258516995108]),
    "block": (
        "block",
        2,
        {"sublayers_per_block": 4, "qk_norm": True, "eps": {"block": 1e-4}},
        "qwen3",
        [1.27350459364, 0.752063631222, -1.86626768211],
    ),
    "full_mh": (
        "full_mh",
        2,
        {"sublayers_per_block": 1, "num_depth_heads": 4, "tied": True},
        "llama",
        [2.10737936437, 0.14221097082, -0.508202294044],
    ),
    "block_mh": (
        "block_mh",
        3,
        {"sublayers_per_block": 2, "num_depth_heads": 3},
        "llama",
        [-1.43111142656, -0.403639159153, -0.353545593503],
    ),
}


@pytest.mark.parametrize("mode, num_blocks, fields, host, golden", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_oracle(mode, num_blocks, fields, host, golden, tmp_path):
    model = ForeignModel(**fields)
    check_golden(model.logits(), golden)
    report = check_import(foreign_checkpoints.multi_head(tmp_path / "source", model, mode, num_blocks), model)
    assert (report.format, report.model_type) == ("multi-head-attn-res", host)
    assert report.dropped == ({"lm_head.weight": "tied to the embeddings"} if model.tied else {})


# label -> tensors, fields, what the message says
REFUSED = {
    "mode": ({}, {"attnres_mode": "delta"}, ["attnres_mode is 'delta'", "'full'"]),
    "gate": ({}, {"attnres_gate_type": "sigmoid_scalar"}, ["attnres_gate_type is 'sigmoid_scalar'", "'bias'"]),
    "null source": ({}, {"attnres_use_null_source": True}, ["attnres_use_null_source is True"]),
    "no read at the output": ({"model.final_res_proj.weight": None}, {}, ["final_res_proj"]),
    "cumulative sources": ({"model.layers.0.attn_res_bias": torch.ones(1)}, {}, ["attn_res_bias", "cumulative"]),
    "new field": ({}, {"attnres_temperature": 2.0}, ["attnres_temperature=2.0"]),
    "a tensor too many": ({"model.layers.1.mlp_pre_gate.weight": torch.ones(2)}, {}, ["mlp_pre_gate"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.multi_head(tmp_path / "source", ForeignModel(sublayers_per_block=1), "full")
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
