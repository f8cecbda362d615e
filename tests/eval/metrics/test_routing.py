"""Depth weights and slot mass against softmaxes written out by hand."""

import copy
import math

import pytest
import torch
from depth_metric_models import random_depth_model
from model_checks import depth_model, randomise_depth
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.metrics.probe import DepthProbe
from hf_depthattn.eval.metrics.routing import depth_weights, slot_mass
from hf_depthattn.eval.metrics.slot_drop import slot_drop
from hf_depthattn.eval.metrics.source_drop import (
    source_drop_matrix,
    visible_sources,
)
from hf_depthattn.eval.metrics.text import TextBatches
from hf_depthattn.eval.metrics.weights import mean_depth_weights

READ_OPTIONS = {
    "paper": {},
    "sum": {"read_scale": "sum"},
    "heads": {"num_depth_heads": 2},
    "sigmoid": {"depth_activation": "sigmoid"},
    "raw keys": {"key_norm": False},
    "input query": {"query": "input"},
    "static": {"static_mix": True, "num_depth_heads": 2},
    "static sum": {"static_mix": True, "read_scale": "sum"},
    "window": {"depth_window": 2},
}


def test_models_without_sources_or_slots_are_errors():
    ids = random_ids(2, 5)
    for call in (depth_weights, source_drop_matrix):
        with pytest.raises(ValueError, match="connection: a 'moda' model has no depth weights"):
            call(random_depth_model("moda"), ids)
    for call in (slot_mass, slot_drop):
        for model in (random_depth_model("block"), tiny_stock_model("llama")):
            with pytest.raises(ValueError, match=r"depth_kv: a .* model has no depth slots"):
                call(model, ids)


def test_a_model_of_one_layer_has_slots_that_nobody_reads():
    config = copy.deepcopy(tiny_stock_model("llama").config)
    config.num_hidden_layers = 1
    model = DepthAttnForCausalLM(DepthAttnConfig.moda(config)).eval()
    with pytest.raises(ValueError, match="num_hidden_layers: no layer of 1 reads a depth slot"):
        slot_mass(model, random_ids(2, 5))


@pytest.mark.parametrize("option", READ_OPTIONS)
def test_depth_weights_are_moments_over_tokens(option):
    model, ids = random_depth_model("block", **READ_OPTIONS[option]), random_ids(5, 6)
    text = TextBatches(ids, batch_size=2)
    result = depth_weights(model, text)
    with torch.no_grad():
        outputs = model(ids, output_depth_attentions=True).depth_attentions
    for site, (weights, columns) in enumerate(zip(outputs, visible_sources(DepthProbe(model)), strict=True)):
        tokens = weights.double().flatten(0, 1)  # [tokens, H, n]
        columns = list(columns)
        assert torch.allclose(result.means[site, columns], tokens.mean((0, 1)), atol=1e-7)
        variance = tokens.var(0, unbiased=False).mean(0)
        assert torch.allclose(result.variances[site, columns], variance, atol=1e-7)
        assert result.means[site].isfinite().sum() == len(columns)
        if len(columns) == 1:
            assert result.entropies[site].isnan()
            continue
        shares = tokens / tokens.sum(-1, keepdim=True)
        entropy = -(shares * shares.log()).sum(-1).mean() / math.log(len(columns))
        assert torch.allclose(result.entropies[site], entropy, atol=1e-6)
        assert result.argmax[site] == columns[tokens.mean((0, 1)).argmax()]
    if option == "static":
        assert result.variances.nan_to_num().max() <= 1e-12 and result.query_norms.isnan().all()
    if option == "paper":
        assert torch.allclose(result.means, mean_depth_weights(model, text), equal_nan=True)
        query = model.get_decoder().layers[1].attn_depth
        assert torch.allclose(result.query_norms[2], (query.query * query.key_norm.weight).norm().double())


def test_zero_queries_are_uniform_and_have_entropy_one():
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    result = depth_weights(model, random_ids(2, 5))
    assert torch.allclose(result.entropies[1:], torch.ones(2 * NUM_LAYERS, dtype=torch.float64), atol=1e-6)
    assert result.variances.nan_to_num().max() <= 1e-12 and (result.query_norms == 0).all()


@pytest.mark.parametrize("depth_kv", ["attention", "attention+mlp"])
def test_slot_masses_and_the_sequence_sum_to_one(depth_kv):
    model, ids = random_depth_model("moda", depth_kv=depth_kv), random_ids(3, 8)
    result = slot_mass(model, TextBatches(ids, batch_size=2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    for layer in range(1, NUM_LAYERS):
        sequence = attentions[layer].double().sum(-1)  # [B, H, T]
        assert torch.allclose(result.totals[layer] + sequence.mean((0, 2)), torch.ones(4).double(), atol=1e-6)
        assert torch.allclose(result.by_position[layer], 1 - sequence.mean((0, 1)), atol=1e-6)
        parts = result.attention[layer] + result.mlp[layer].nan_to_num()
        assert torch.allclose(parts, result.totals[layer], atol=1e-9)
    assert result.totals[0].isnan().all() and result.mlp.isnan().all() == (depth_kv == "attention")


def test_slots_are_named_by_writer_and_age():
    model, ids = random_depth_model("moda"), random_ids(3, 8)
    result = slot_mass(model, ids)
    assert result.slots == ("attn 0", "mlp 0", "attn 1", "mlp 1")
    with torch.no_grad():
        weights = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()  # [B, H, T, 4]
    assert torch.allclose(result.by_slot[2], weights.mean((0, 2)), atol=1e-7)
    means = weights.mean((0, 1, 2))
    assert torch.allclose(result.attention_by_age[2, [2, 1]], means[[0, 2]], atol=1e-7)
    assert torch.allclose(result.mlp_by_age[2, [2, 1]], means[[1, 3]], atol=1e-7)
    assert result.attention_by_age[2, 0].isnan() and result.attention_by_age[1, 2].isnan()
    expected = sum(4 / (t + 4) for t in range(1, 9)) / 8
    assert math.isclose(result.uniform[2], expected, abs_tol=1e-12)
    assert not result.gated


def test_randomised_models_route_by_token():
    """The comparisons above would pass trivially if weights did not depend on the token."""
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    randomise_depth(model)
    result = depth_weights(model, random_ids(2, 9))
    assert (result.variances[3:].nan_to_num().max(-1).values > 1e-4).all()
