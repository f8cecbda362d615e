"""Permutation scores against losses of models with exchanged layers."""

import math

import pytest
import torch
from depth_metric_models import (
    close,
    loss_by_hand,
    run_by_hand,
)
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn.eval.metrics.permutation import permutation_scores


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
def test_permutation_scores(model, text, pairs):
    result = permutation_scores(model, text, pairs=pairs)
    with torch.no_grad():
        loss = loss_by_hand(run_by_hand(model, text.ids)[1], text.ids)
        expected = {}
        for i, j in [(0, 1), (1, 2), (0, 2)][: 3 if pairs == "all" else 2]:
            layers = list(model.model.layers)
            layers[i], layers[j] = layers[j], layers[i]
            expected[i, j] = loss_by_hand(run_by_hand(model, text.ids, layers)[1], text.ids) - loss
    for (i, j), increase in expected.items():
        assert close(result.loss_increase[i, j], increase) and close(result.scores[j, i], abs(increase) / loss)
    assert result.num_pairs == len(expected) == result.scores.isfinite().sum() / 2
    assert close(result.mean, sum(map(abs, expected.values())) / loss / len(expected))
    # With three layers every pair has the first or the last.
    assert math.isnan(result.inner_mean) and result.edge_mean == result.mean


def test_inner_pairs_are_reported_apart():
    model = tiny_stock_model("llama", num_hidden_layers=4)
    result = permutation_scores(model, random_ids(2, 6), pairs="all")
    assert result.inner_mean == result.scores[1, 2].item()
    assert result.num_pairs == 6
    assert abs(6 * result.mean - (5 * result.edge_mean + result.inner_mean)) <= 1e-9


def test_layers_of_other_shapes_are_left_out():
    model = tiny_stock_model("llama")
    model.model.layers[2].mlp = tiny_stock_model("llama", intermediate_size=48).model.layers[2].mlp
    result = permutation_scores(model, random_ids(2, 6), pairs="all")
    assert (result.num_pairs, result.num_unfit_pairs) == (1, 2) and result.scores[0, 2].isnan()
