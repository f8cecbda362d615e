"""`angular_distance` against a direct computation on a tiny llama."""

import math

from depth_metric_models import (
    close,
    cosine,
)
from tiny_hosts import NUM_LAYERS

from hf_depthattn.eval.metrics.angular_distance import angular_distance


def test_angular_distance(model, text, states):
    result = angular_distance(model, text)
    last = angular_distance(model, text, tokens="last")
    for i in range(NUM_LAYERS + 1):
        for j in range(NUM_LAYERS + 1):
            angles = cosine(states[i], states[j]).clamp(-1, 1).arccos() / math.pi
            assert close(result.distances[i, j], angles.mean() if j > i else math.nan)
            assert close(last.distances[i, j], angles[:, -1].mean() if j > i else math.nan)
    assert close(result.adjacent, [result.distances[i, i + 1] for i in range(NUM_LAYERS)])
