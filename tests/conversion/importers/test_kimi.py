"""AttnRes under the names of Kimi K3, against a stock `kimi_linear` whose norms read the sources."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import logits_with_reads
from imports_of_checkpoints import check_refused, edit, load_complete
from model_checks import relative_max_error
from tiny_hosts import ALL_HOSTS, random_ids, tiny_stock_model

from hf_depthattn.conversion.import_checkpoint import import_checkpoint
from hf_depthattn.conversion.importers import kimi
from hf_depthattn.conversion.importers.foreign_checkpoint import read_foreign_checkpoint

pytestmark = pytest.mark.skipif("kimi_linear" not in ALL_HOSTS, reason="transformers has no kimi_linear")


@pytest.fixture(scope="module")
def stock():
    return tiny_stock_model("kimi_linear")


@pytest.mark.parametrize("num_decoder_layers", [1, 2, 12])
def test_logits_are_those_of_its_layers_with_reads(num_decoder_layers, stock, tmp_path):
    source = foreign_checkpoints.kimi(tmp_path / "source", stock, attn_res_block_size=num_decoder_layers)
    report = import_checkpoint(source, tmp_path / "out")
    assert (report.format, report.model_type) == ("kimi", "kimi_linear")
    reads = list(foreign_checkpoints.kimi_reads(stock).values())
    query, key_norm = (torch.stack([value.flatten() for value in reads[start::2]]).float() for start in (0, 1))
    ids = random_ids(2, 9)
    expected = logits_with_reads(stock, query, key_norm, 2 * num_decoder_layers, ids)
    with torch.no_grad():
        found = load_complete(tmp_path / "out")(ids, use_cache=False).logits
    assert relative_max_error(found, expected) <= 1e-5
    assert relative_max_error(stock(ids, use_cache=False).logits, expected) > 1e-2


def test_fields_of_the_published_kimi_linear_are_known(stock, tmp_path):
    """Those that the class of transformers does not declare, as in moonshotai/Kimi-Linear-48B-A3B-Instruct."""
    linear_attention = {"num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
    source = foreign_checkpoints.kimi(
        tmp_path / "source",
        stock,
        layer_types=None,
        mlp_layer_types=None,
        linear_attn_config=linear_attention | {"kda_layers": [1, 2], "full_attn_layers": [3]},
        first_k_dense_replace=2,
        head_dim=72,
        mla_use_nope=True,
        moe_layer_freq=1,
        moe_router_activation_func="sigmoid",
        num_nextn_predict_layers=0,
        rope_scaling=None,
        rope_theta=10000.0,
        use_grouped_topk=True,
    )
    foreign = read_foreign_checkpoint(source)
    host = kimi.plan(foreign).host
    assert host.layer_types == ["linear_attention", "linear_attention", "full_attention"]
    assert host.mlp_layer_types == ["dense", "dense", "sparse"]


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
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, stock, tmp_path):
    source = foreign_checkpoints.kimi(tmp_path / "source", stock)
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
