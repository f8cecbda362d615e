"""Logit lens: predictions read from every intermediate state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches
from .probing.token_losses import token_losses


@dataclass(frozen=True, eq=False, kw_only=True)
class LogitLens(MetricResult):
    """Result of `logit_lens`; entry L is the model's own prediction.

    Attributes:
        cross_entropy: [L + 1], next-token loss of the predictions from z_l, in nats.
        kl: [L + 1], KL(p_final || p_l) in nats.
        top5_overlap: [L + 1], fraction of the final top-5 tokens that are among the top-5 tokens of z_l.
    """

    cross_entropy: Tensor
    kl: Tensor
    top5_overlap: Tensor


@depth_metric
def logit_lens(probe: DepthProbe, text: TextBatches) -> LogitLens:
    """Apply the model's final norm and head to every state (nostalgebraist's logit lens; DepthBench).

        p_l = softmax(head(norm(z_l)));   CE_l, KL(p_L || p_l), |top5(p_l) and top5(p_L)| / 5

    With AttnRes, the state is what layer l reads (DepthBench, arXiv 2609.32534). Soft-capping and logit scaling of the
    model are applied. Memory: (L + 1) B T D numbers for one batch.

    Args:
        probe: the model.
        text: the text.
    """
    number = probe.num_layers + 1
    loss, kl, overlap = (torch.zeros(number, dtype=torch.float64) for _ in range(3))
    for ids in text:
        states: dict[int, Tensor] = {}
        with probe.observe_states(states.__setitem__):
            final = probe.logits(ids)
        num_top = min(5, final.shape[-1])
        for index in range(number):
            # Free each state after use.
            logits = probe.readout(states.pop(index))
            loss[index] += token_losses(logits, ids).double().sum().item()
            # One sequence at a time: float32 copies of two batches of logits may not fit in memory.
            for row, final_row in zip(logits, final, strict=True):
                log_p, log_final = _log_probabilities(row), _log_probabilities(final_row)  # [T, V]
                kl[index] += (log_final.exp() * (log_final - log_p)).sum(dim=-1).double().sum().item()
                top, final_top = row.topk(num_top).indices, final_row.topk(num_top).indices  # [T, 5]
                same = (top.unsqueeze(-1) == final_top.unsqueeze(-2)).sum(dim=(-1, -2)).double()
                # The top-5 tokens of NaN logits would agree by chance.
                same[row.isnan().any(dim=-1) | final_row.isnan().any(dim=-1)] = torch.nan
                overlap[index] += same.sum().item() / num_top
    return LogitLens(
        cross_entropy=loss / (text.num_sequences * (text.sequence_length - 1)),
        kl=kl / text.num_tokens,
        top5_overlap=overlap / text.num_tokens,
    )


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _num_forwards(probe: DepthProbe) -> float:
    """Return one pass plus, per state, the head and three softmaxes, by the head's share of the parameters."""
    head = probe.model.get_output_embeddings()
    total = sum(p.numel() for p in probe.model.parameters())
    readout = 0.4 if head is None else min(1.0, 3.0 * sum(p.numel() for p in head.parameters()) / total)
    return 1 + (probe.num_layers + 1) * readout


METRICS = {"logit_lens": DepthMetric(logit_lens, _num_forwards, True)}
