"""Depth slots dropped from the softmax, against softmaxes written out by hand."""

import copy
import math

import pytest
import torch
from depth_metric_models import random_depth_model
from tiny_hosts import random_ids

from hf_depthattn.eval.metrics.probing.interventions import drop_slots, visible_slots
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.slot_drop import slot_drop


@pytest.mark.parametrize("num_slots", [1, 3])
def test_visible_slots_are_those_that_layers_read(num_slots):
    model = random_depth_model("moda", num_depth_slots=num_slots)
    names = [("attn", 0), ("mlp", 0), ("attn", 1), ("mlp", 1)]
    expected = [[], names[:2][-num_slots:], names[-num_slots:]]
    assert visible_slots(model.config) == expected


def test_dropped_slots_leave_the_softmax():
    model, ids = random_depth_model("moda"), random_ids(2, 8)
    layers = DepthProbe(model).layers
    with torch.no_grad():
        whole = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()
        with drop_slots(model.config, layers, {("attn", 1)}):
            dropped = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()
    # Layer 2 has the same inputs in both runs: its weights are renormalised, the sequence's share among them.
    rest = whole[..., [0, 1, 3]]
    expected = rest / (1 - whole[..., [2]])
    assert torch.allclose(dropped, expected, atol=1e-6)
    twice = drop_slots(model.config, layers, {("attn", 0)})
    message = "cannot be nested"
    with drop_slots(model.config, layers, {("attn", 1)}), pytest.raises(ValueError, match=message), twice:
        pass


def test_slot_drop_compares_losses():
    model, ids = random_depth_model("moda"), random_ids(3, 8)
    probe, result = DepthProbe(model), slot_drop(model, ids)
    assert result.slots == ("attn 0", "mlp 0", "attn 1", "mlp 1")
    with torch.no_grad():
        for index, slot in enumerate([("attn", 0), ("mlp", 0), ("attn", 1), ("mlp", 1)]):
            with drop_slots(model.config, probe.layers, {slot}):
                assert result.by_slot[index] == probe.loss(TextBatches(ids)) - result.loss
    others = result.by_slot[[0, 2, 3]].mean()
    assert torch.allclose(result.by_slot_controls[1], others) and result.by_slot.abs().min() > 0
    # A gate of zero is a layer without slots.
    gated = random_depth_model("moda", depth_gate="head")
    for layer in (1, 2):
        closed = copy.deepcopy(gated)
        torch.nn.init.zeros_(closed.get_decoder().layers[layer].attn_depth_kv.gate)
        with torch.no_grad():
            expected = DepthProbe(closed).loss(TextBatches(ids)) - DepthProbe(gated).loss(TextBatches(ids))
        assert math.isclose(slot_drop(gated, ids).by_layer[layer], expected, abs_tol=1e-6)
    assert result.by_layer[0].isnan()
