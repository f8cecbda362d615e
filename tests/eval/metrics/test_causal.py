"""Causal scores against a direct computation on a tiny llama."""

import math

import torch
from depth_metric_models import (
    close,
    loss_by_hand,
    run_by_hand,
    sublayers_by_hand,
)
from tiny_hosts import NUM_LAYERS, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.causal import causal_scores


def test_causal_scores(model, text, states):
    result = causal_scores(model, text)
    layers = list(model.model.layers)
    with torch.no_grad():
        loss = loss_by_hand(run_by_hand(model, text.ids)[1], text.ids)
        for s in range(NUM_LAYERS):
            changed, logits = run_by_hand(model, text.ids, layers[:s] + layers[s + 1 :])
            changed.insert(s + 1, changed[s])
            assert close(result.loss_increase[s], loss_by_hand(logits, text.ids) - loss)
            for later in range(NUM_LAYERS):
                update = states[later + 1] - states[later]
                difference = (changed[later + 1] - changed[later] - update).norm(dim=-1)
                expected = difference.mean() / update.norm(dim=-1).mean()
                assert close(result.scores[s, later], expected if later > s else math.nan, 1e-4)
                expected = (difference / update.norm(dim=-1)).mean()
                assert close(result.token_scores[s, later], expected if later > s else math.nan, 1e-4)
    assert close(result.mean, sum(result.scores[i, j] for i, j in [(0, 1), (0, 2), (1, 2)]) / 3)
    assert close(result.per_skipped[0], result.scores[0, 1:].mean()) and result.per_skipped[-1].isnan()


def test_causal_scores_of_sublayers(model, text, sublayers):
    result = causal_scores(model, text, level="sublayer")
    assert result.names[:2] == ("attn 0", "mlp 0") and result.scores.shape == (2 * NUM_LAYERS, 2 * NUM_LAYERS)
    bare = tiny_stock_model("llama")
    bare.load_state_dict(model.state_dict())
    nn.init.zeros_(bare.model.layers[0].mlp.down_proj.weight)
    with torch.no_grad():
        changed = sublayers_by_hand(bare, text.ids)
    for later in range(2, 2 * NUM_LAYERS):
        y = sublayers[later][1]
        expected = (changed[later][1] - y).norm(dim=-1).mean() / y.norm(dim=-1).mean()
        assert close(result.scores[1, later], expected, 1e-4)
