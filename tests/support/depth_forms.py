"""Variants of depth models for tests of whole models."""

import pytest
from model_checks import depth_model, randomise_depth
from tiny_hosts import tiny_stock_model

from hf_depthattn import DepthAttnForCausalLM

#: label -> fields of the config
FORMS = {
    "full": {"sublayers_per_block": 1},
    "block3": {"sublayers_per_block": 3},
    "block2-sum": {"sublayers_per_block": 2, "read_scale": "sum"},
    "residual": {"connection": "residual"},
    "moda": {"connection": "residual", "depth_kv": "attention+mlp"},
    "moda-gate-block2": {"sublayers_per_block": 2, "depth_kv": "attention+mlp", "depth_gate": "head"},
    "moda-slots": {
        "connection": "residual",
        "depth_kv": "attention+mlp",
        "depth_kv_bias": True,
        "depth_slots": [[], [1], [0, 3]],
    },
}
every_form = pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS.keys())


def random_model(model_type: str = "llama", host_fields: dict | None = None, **fields) -> DepthAttnForCausalLM:
    """Build a tiny model with random depth parameters and without an end-of-sequence token."""
    model = depth_model(tiny_stock_model(model_type, **(host_fields or {})), **fields)
    randomise_depth(model)
    model.generation_config.eos_token_id = None
    return model
