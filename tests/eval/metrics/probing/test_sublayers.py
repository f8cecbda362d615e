"""Where sublayers read and write, against layers run by hand."""

import pytest
import torch
from depth_metric_models import (
    HOST_FAMILIES,
    family_model,
    sublayers_by_hand,
)
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn.eval.metrics.probing.probe import DepthProbe


@pytest.mark.parametrize("model_type", HOST_FAMILIES)
def test_sublayers_add_up_to_the_layer(model_type):
    probe, ids = DepthProbe(family_model(model_type)), random_ids(2, 7)
    states, updates = [], [0.0] * NUM_LAYERS

    def add(sublayer, x, y):
        updates[sublayer.layer] = updates[sublayer.layer] + y

    observed = probe.observe_states(lambda index, state: states.append(state))
    with torch.no_grad(), observed, probe.observe_sublayers(add):
        probe.logits(ids)
    for layer, update in enumerate(updates):
        assert torch.allclose(states[layer] + update, states[layer + 1], atol=1e-5)


def test_sublayer_inputs_and_outputs_are_those_of_the_layer():
    model, ids = tiny_stock_model("llama"), random_ids(2, 9)
    probe, seen = DepthProbe(model), []
    with torch.no_grad(), probe.observe_sublayers(lambda sublayer, x, y: seen.append((sublayer.name, x, y))):
        probe.logits(ids)
    with torch.no_grad():
        expected = sublayers_by_hand(model, ids)
    assert (
        [name for name, *_ in seen]
        == [s.name for s in probe.sublayers]
        == ["attn 0", "mlp 0", "attn 1", "mlp 1", "attn 2", "mlp 2"]
    )
    for (_, x, y), (h, output) in zip(seen, expected, strict=True):
        assert torch.allclose(x, h, atol=1e-6) and torch.allclose(y, output, atol=1e-6)


def test_unknown_sublayers_are_an_error_and_layers_still_work():
    model = tiny_stock_model("llama")
    del model.model.layers[1].input_layernorm
    probe = DepthProbe(model)
    assert not probe.knows_sublayers
    with pytest.raises(ValueError, match="LlamaDecoderLayer has no input_layernorm"):
        _ = probe.sublayers
    with pytest.raises(ValueError, match="layer must be between 0 and 2, got 3"):
        probe.skip(3)
