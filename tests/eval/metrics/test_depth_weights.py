"""Depth weights against softmaxes written out by hand."""

import math

import pytest
import torch
from depth_metric_models import READ_OPTIONS, random_depth_model, score_weight
from model_checks import depth_model, randomise_depth
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn.eval.metrics.depth_weights import depth_weights
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.slot_drop import slot_drop
from hf_depthattn.eval.metrics.slot_mass import slot_mass
from hf_depthattn.eval.metrics.source_drop import (
    source_drop_matrix,
    visible_sources,
)
from hf_depthattn.eval.metrics.weights import mean_depth_weights


def test_models_without_sources_or_slots_are_errors():
    ids = random_ids(2, 5)
    for call in (depth_weights, source_drop_matrix):
        with pytest.raises(ValueError, match="connection: a 'moda' model has no depth weights"):
            call(random_depth_model("moda"), ids)
    for call in (slot_mass, slot_drop):
        for model in (random_depth_model("block"), tiny_stock_model("llama")):
            with pytest.raises(ValueError, match=r"depth_kv: a .* model has no depth slots"):
                call(model, ids)


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
        assert torch.allclose(result.query_norms[2], score_weight(model, 2).norm().double())
        assert len(result.query_norms) == 2 * NUM_LAYERS + 1


def test_zero_queries_are_uniform_and_have_entropy_one():
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    result = depth_weights(model, random_ids(2, 5))
    assert torch.allclose(result.entropies[1:], torch.ones(2 * NUM_LAYERS, dtype=torch.float64), atol=1e-6)
    assert result.variances.nan_to_num().max() <= 1e-12 and (result.query_norms == 0).all()


def test_randomised_models_route_by_token():
    """The comparisons above would pass trivially if weights did not depend on the token."""
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    randomise_depth(model)
    result = depth_weights(model, random_ids(2, 9))
    assert (result.variances[3:].nan_to_num().max(-1).values > 1e-4).all()
