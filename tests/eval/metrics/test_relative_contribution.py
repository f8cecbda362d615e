"""`relative_contribution` against a direct computation on a tiny llama."""

from depth_metric_models import (
    close,
    cosine,
)
from tiny_hosts import NUM_LAYERS

from hf_depthattn.eval.metrics.relative_contribution import relative_contribution


def test_relative_contribution(model, text, states, sublayers):
    result = relative_contribution(model, text)
    for layer in range(NUM_LAYERS):
        stream, change = states[layer], states[layer + 1] - states[layer]
        assert close(result.layers[layer], (change.norm(dim=-1) / stream.norm(dim=-1)).mean())
        assert close(result.layer_cosines[layer], cosine(change, stream).mean())
    assert close(result.sublayers, [(y.norm(dim=-1) / x.norm(dim=-1)).mean() for x, y in sublayers])
    assert close(result.sublayer_cosines, [cosine(x, y).mean() for x, y in sublayers])
