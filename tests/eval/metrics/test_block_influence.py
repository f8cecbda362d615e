"""`block_influence` against a direct computation on a tiny llama."""

import itertools

from depth_metric_models import (
    close,
    cosine,
)

from hf_depthattn.eval.metrics.block_influence import block_influence


def test_block_influence(model, text, states):
    expected = [1 - cosine(x, y).mean() for x, y in itertools.pairwise(states)]
    assert close(block_influence(model, text).scores, expected)
