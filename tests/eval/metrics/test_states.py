"""Metrics of the states against a direct computation on a tiny llama."""

import itertools
import math

import torch
from depth_metric_models import (
    close,
    random_depth_model,
)
from tiny_hosts import NUM_LAYERS, random_ids

from hf_depthattn.eval.metrics.states import (
    angular_distance,
    block_influence,
    output_magnitude,
    output_variance,
    relative_contribution,
)
from hf_depthattn.eval.metrics.text import TextBatches


def cosine(x, y):
    return torch.cosine_similarity(x, y, dim=-1)


def test_angular_distance(model, text, states):
    result = angular_distance(model, text)
    last = angular_distance(model, text, tokens="last")
    for i in range(NUM_LAYERS + 1):
        for j in range(NUM_LAYERS + 1):
            angles = cosine(states[i], states[j]).clamp(-1, 1).arccos() / math.pi
            assert close(result.distances[i, j], angles.mean() if j > i else math.nan)
            assert close(last.distances[i, j], angles[:, -1].mean() if j > i else math.nan)
    assert close(result.adjacent, [result.distances[i, i + 1] for i in range(NUM_LAYERS)])


def test_block_influence(model, text, states):
    expected = [1 - cosine(x, y).mean() for x, y in itertools.pairwise(states)]
    assert close(block_influence(model, text).scores, expected)


def test_output_variance(model, text, states, sublayers):
    result = output_variance(model, text)
    assert close(result.states, [x.var(-1).mean() for x in states])
    assert close(result.sublayers, [y.var(-1).mean() for _, y in sublayers])


def test_output_magnitude(model, text, states, sublayers):
    result = output_magnitude(model, text)
    assert close(result.states, [x.square().mean(-1).sqrt().mean() for x in states])
    assert close(result.sublayers, [y.square().mean(-1).sqrt().mean() for _, y in sublayers])
    assert result.sources is None


def test_magnitude_of_sources_is_that_of_block_sums():
    model, ids = random_depth_model("block"), random_ids(3, 7)
    seen = []
    site = model.get_decoder().layers[-1].out_depth
    with torch.no_grad(), site.register_forward_pre_hook(lambda site, args: seen.append(args[0])):
        model(ids)
    sources = torch.stack([*seen[0].sources, seen[0].partial]).double()
    result = output_magnitude(model, TextBatches(ids, batch_size=2))
    assert close(result.sources, sources.square().mean(-1).sqrt().mean((1, 2)))


def test_relative_contribution(model, text, states, sublayers):
    result = relative_contribution(model, text)
    for layer in range(NUM_LAYERS):
        stream, change = states[layer], states[layer + 1] - states[layer]
        assert close(result.layers[layer], (change.norm(dim=-1) / stream.norm(dim=-1)).mean())
        assert close(result.layer_cosines[layer], cosine(change, stream).mean())
    assert close(result.sublayers, [(y.norm(dim=-1) / x.norm(dim=-1)).mean() for x, y in sublayers])
    assert close(result.sublayer_cosines, [cosine(x, y).mean() for x, y in sublayers])
