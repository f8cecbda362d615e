"""Gradient magnitudes against the gradients of a loss that is written out."""

import torch
from depth_metric_models import (
    close,
    random_depth_model,
    run_by_hand,
    traces,
)
from tiny_hosts import NUM_LAYERS, random_ids
from torch import nn

from hf_depthattn.eval.metrics.gradients import gradient_magnitude
from hf_depthattn.eval.metrics.probing.text import TextBatches


def test_gradient_magnitude(model):
    ids = random_ids(4, 8)
    result = gradient_magnitude(model, TextBatches(ids, batch_size=2))
    layers = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    outputs = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    for part in ids.split(2):
        states, logits = run_by_hand(model, part)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        # Behind the MLP the state is a sum: its gradient is that of the MLP's output.
        found = torch.autograd.grad(loss, states[1:], retain_graph=True)
        outputs += torch.stack([g.double().norm() for g in found])
        for index, layer in enumerate(model.model.layers):
            found = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            layers[index] += torch.cat([g.flatten() for g in found]).double().norm()
    assert close(result.layer_parameters, layers / 2)
    assert close(result.sublayer_outputs[1::2], outputs / 2)
    assert result.depth_parameters.isnan().all() and result.batch_tokens == 16


def test_gradients_of_frozen_and_depth_parameters():
    model, ids = random_depth_model("block"), random_ids(2, 8)
    free = gradient_magnitude(model, ids)
    model.requires_grad_(False)
    before = traces(model)
    frozen = gradient_magnitude(model, ids)
    assert traces(model) == before
    assert close(frozen.layer_parameters, free.layer_parameters) and (free.depth_parameters > 0).all()
    loss = nn.functional.cross_entropy
    model.requires_grad_(True)
    logits = model(ids).logits
    queries = list(model.get_decoder().depth_reads.parameters())
    found = torch.autograd.grad(loss(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), queries)
    assert close(free.depth_parameters[1], torch.cat([gradient[2:4] for gradient in found]).double().norm())
    # The output site counts as part of the last layer.
    assert close(free.depth_parameters[-1], torch.cat([gradient[-3:] for gradient in found]).double().norm())
