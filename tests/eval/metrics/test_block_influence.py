"""`block_influence` against a direct computation on a tiny llama."""

import itertools

import torch
from depth_metric_models import (
    close,
)

from hf_depthattn.eval.metrics.block_influence import block_influence


def cosine(x, y):
    return torch.cosine_similarity(x, y, dim=-1)


def test_block_influence(model, text, states):
    expected = [1 - cosine(x, y).mean() for x, y in itertools.pairwise(states)]
    assert close(block_influence(model, text).scores, expected)
