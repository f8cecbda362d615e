"""AttnRes under the names of Kimi K3, against a float64 oracle."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import IDS
from imports_of_checkpoints import check_golden, check_refused, edit, load_complete
from kimi_oracle import KimiModel
from model_checks import relative_max_error
from tiny_hosts import needs_kimi_linear

from hf_depthattn.conversion.import_checkpoint import import_checkpoint

pytestmark = needs_kimi_linear

# Number of decoder layers per block -> first logits of the last token
GOLDEN = {
    1: [-1.00386557322, -2.13942504725, -2.85677345534],
    2: [0.545915740587, -0.292160527079, -0.00406074820656],
    12: [0.156428355512, -0.396552653389, 0.773539706286],
}


@pytest.mark.parametrize("num_decoder_layers, golden", GOLDEN.items(), ids=map(str, GOLDEN))
def test_logits_are_those_of_the_oracle(num_decoder_layers, golden, tmp_path):
    """In float32: norms, delta attention and router of transformers compute in float32 whatever the dtype is."""
    model = KimiModel(attn_res_block_size=num_decoder_layers)
    expected = model.logits()
    check_golden(expected, golden)
    report = import_checkpoint(foreign_checkpoints.kimi(tmp_path / "source", model), tmp_path / "out")
    assert (report.format, report.model_type) == ("kimi", "kimi_linear")
    with torch.no_grad():
        found = load_complete(tmp_path / "out")(IDS, use_cache=False).logits
    assert relative_max_error(found.double(), expected) <= 1e-5


def test_kimi_k3_is_refused_for_what_it_is_and_not_for_its_packed_weights(tmp_path):
    """Names, nesting and packing of its weights, in MXFP4; no checkpoint without them is published."""
    layer = "language_model.model.layers.1"
    tensors = {
        f"{layer}.self_attention_res_proj.weight": torch.ones(1, 32, dtype=torch.bfloat16),
        f"{layer}.block_sparse_moe.experts.0.w1.weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
    }
    text_config = {"model_type": "kimi_linear", "attn_res_block_size": 12, "hidden_act": "situ"}
    config = {"model_type": "kimi_k3", "text_config": text_config, "quantization_config": {"quant_method": "mxfp4"}}
    source = foreign_checkpoints.save(tmp_path / "source", config, tensors)
    check_refused(source, tmp_path / "out", "model_type 'kimi_k3' has no host", "latent experts", "'kimi_linear'")


QUERY = "model.layers.1.self_attention_res_proj.weight"
# label -> tensors, fields, what the message says
REFUSED = {
    "quantised": ({}, {"quantization_config": {"bits": 4}}, ["is quantised", "Import the unquantised checkpoint"]),
    "latent experts": ({}, {"routed_expert_hidden_size": 8}, ["routed_expert_hidden_size is 8"]),
    "gate": ({}, {"use_full_rank_gate": True}, ["use_full_rank_gate is True"]),
    **{
        f"unknown {name}": ({}, {name: value}, [f"{name}={value!r}", "cannot be imported"])
        for name, value in {
            "attn_res_gate": True,
            "attn_res_temperature": 3.0,
            "attn_res_num_heads": 4,
            "depth_scale": 0.5,
        }.items()
    },
    "rotation": ({}, {"mla_use_nope": False}, ["mla_use_nope is False", "True"]),
    "experts in some layers": ({}, {"moe_layer_freq": 2}, ["moe_layer_freq is 2"]),
    "another router": ({}, {"moe_router_activation_func": "softmax"}, ["'softmax'", "'sigmoid'"]),
    "groups that are not used": (
        {},
        {"num_expert_group": 2, "use_grouped_topk": False},
        ["use_grouped_topk is False"],
    ),
    "bound of the decay": (
        {},
        {"linear_attn_config": {"gate_lower_bound": -5.0}},
        ["linear_attn_config.gate_lower_bound=-5.0"],
    ),
    "no size": ({}, {"attn_res_block_size": None}, ["attn_res_block_size is None"]),
    "no query": ({QUERY: None}, {}, [f"lacks the tensor '{QUERY}'"]),
    "a tensor too many": ({"model.layers.1.self_attn.g_proj.weight": torch.ones(2)}, {}, ["self_attn.g_proj"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.kimi(tmp_path / "source", KimiModel())
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
