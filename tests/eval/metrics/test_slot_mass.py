"""Slot mass against softmaxes written out by hand."""

import copy
import math

import pytest
import torch
from depth_metric_models import random_depth_model
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.slot_mass import slot_mass


def test_a_model_of_one_layer_has_slots_that_nobody_reads():
    config = copy.deepcopy(tiny_stock_model("llama").config)
    config.num_hidden_layers = 1
    model = DepthAttnForCausalLM(DepthAttnConfig.moda(config)).eval()
    with pytest.raises(ValueError, match="num_hidden_layers: no layer of 1 reads a depth slot"):
        slot_mass(model, random_ids(2, 5))


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
