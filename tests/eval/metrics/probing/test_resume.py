"""Passes that begin at the changed layer give the numbers of whole passes, bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from depth_metric_models import DEPTH_FAMILIES, random_depth_model, traces
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.registry import DEPTH_METRICS, depth_metrics_of

MODELS = {
    **{family: partial(random_depth_model, family) for family in DEPTH_FAMILIES},
    **{host: partial(tiny_stock_model, host) for host in ("llama", "gemma2", "mamba", "qwen3_moe")},
}


TEXT = TextBatches(random_ids(4, 9), batch_size=3)


def plain(result) -> dict:
    return {name: value for name, value in result.to_dict().items() if name != "cost"}


@pytest.mark.parametrize("label", MODELS)
def test_metrics_are_the_same_with_whole_passes(label):
    model = MODELS[label]().eval()
    probe, whole = DepthProbe(model), DepthProbe(model)
    assert probe._can_resume
    whole._can_resume = False
    before = traces(model)
    fewer = 0
    for name in depth_metrics_of(probe, full=True):
        found, expected = (DEPTH_METRICS[name].run(p, TEXT) for p in (probe, whole))
        assert plain(found) == plain(expected), name
        fewer += found.cost.num_forwards < expected.cost.num_forwards
    # Causal scores, permutation, usefulness, and drops where there are sources or slots.
    assert fewer >= 4 and traces(model) == before


def test_layers_before_a_change_run_once():
    model = random_depth_model("block")
    probe = DepthProbe(model)
    assert probe._can_resume
    calls = [0] * probe.num_layers
    for number, layer in enumerate(probe.layers):

        def count(*_, number=number):
            calls[number] += 1

        layer.mlp.register_forward_hook(count)
    changes = [(layer, partial(probe.skip, layer)) for layer in range(probe.num_layers)]
    one_batch = TEXT.first(3)
    start = probe.num_forwards
    loss, changed = probe.losses(one_batch, changes)
    # Layer l runs in the first pass and in those of the changes at or before it.
    assert calls == [2 + layer for layer in range(probe.num_layers)]
    assert probe.num_forwards - start == pytest.approx(sum(calls) / probe.num_layers)
    for (_, change), value in zip(changes, changed, strict=True):
        with change():
            assert probe.loss(one_batch) == value
    assert loss == probe.loss(one_batch)


class _SharesBesideTheStream(nn.Module):
    """A layer that leaves something for the later ones outside of what it returns, as hosts with shared keys do."""

    def __init__(self, inner: nn.Module, shared: dict[str, torch.Tensor], writes: bool):
        super().__init__()
        self.inner, self.shared, self.writes = inner, shared, writes

    def forward(self, hidden_states, **kwargs):
        if self.writes:
            self.shared["value"] = hidden_states
            return self.inner(hidden_states, **kwargs)
        return self.inner(hidden_states + self.shared.pop("value", 0), **kwargs)


@pytest.mark.parametrize("missing", ["other numbers", "an error"])
def test_hosts_that_pass_more_than_the_stream_run_whole_passes(missing):
    model = tiny_stock_model("llama")
    shared: dict[str, torch.Tensor] = {}
    layers = model.model.layers
    layers[0] = _SharesBesideTheStream(layers[0], shared, writes=True)
    layers[-1] = _SharesBesideTheStream(layers[-1], shared, writes=False)
    if missing == "an error":
        layers[-1].shared = _Strict(shared)
        layers[0].shared = layers[-1].shared
    probe = DepthProbe(model)
    assert not probe._can_resume
    change = [(probe.num_layers - 1, partial(probe.skip, probe.num_layers - 1))]
    start = probe.num_forwards
    _, (changed,) = probe.losses(TEXT, change)
    assert probe.num_forwards - start == 2 * len(TEXT)
    with change[0][1]():
        assert probe.loss(TEXT) == changed


class _Strict(dict):
    """Has no defaults."""

    def pop(self, key, default=None):
        return super().pop(key)


def test_a_layer_that_fails_leaves_nothing_behind():
    model = random_depth_model("block+moda")
    probe = DepthProbe(model)
    before = traces(model)

    def fails():
        raise RuntimeError("no such change")

    with pytest.raises(RuntimeError, match="no such change"):
        probe.losses(TEXT, [(2, fails)])
    with pytest.raises(RuntimeError, match="inside"), probe.recorded() as inputs:
        probe.logits(random_ids(1, 5))
        with probe.resumed_at(2, inputs):
            raise RuntimeError("inside")
    assert traces(model) == before and probe._share == 1.0
