"""The logit lens against a direct computation on a tiny llama."""

import torch
from depth_metric_models import (
    close,
    loss_by_hand,
)

from hf_depthattn.eval.metrics.logit_lens import logit_lens


def test_logit_lens(model, text, states):
    result = logit_lens(model, text)
    with torch.no_grad():
        logits = [model.lm_head(model.model.norm(state.float())).double() for state in states]
    final = logits[-1].log_softmax(-1)
    for index, row in enumerate(logits):
        assert close(result.cross_entropy[index], loss_by_hand(row, text.ids))
        assert close(result.kl[index], (final.exp() * (final - row.log_softmax(-1))).sum(-1).mean())
        overlap = [
            len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
            for a, b in zip(row.flatten(0, 1), final.flatten(0, 1), strict=True)
        ]
        assert close(result.top5_overlap[index], sum(overlap) / len(overlap))
    assert result.kl[-1] == 0 and result.top5_overlap[-1] == 1
