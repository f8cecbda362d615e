"""Angles between the states of all pairs of layers, in one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.state_means import unit_vectors
from .probing.text import TextBatches

TOKENS = ("all", "last")


@dataclass(frozen=True, eq=False, kw_only=True)
class AngularDistance(MetricResult):
    """Result of `angular_distance`.

    Attributes:
        tokens: `"all"` or `"last"`.
        distances: [L + 1, L + 1], distance d(l, m) in [0, 1]; NaN for m <= l.
        adjacent: [L], distance between z_l and z_{l+1}.
    """

    tokens: str
    distances: Tensor
    adjacent: Tensor


@depth_metric
def angular_distance(probe: DepthProbe, text: TextBatches, *, tokens: str = "all") -> AngularDistance:
    """Measure the mean angle between states (LNS, arXiv 2502.05795).

        d(l, m) = mean_t arccos(cos(z_l, z_m)) / pi

    LNS only uses the last token of a sequence and normalises rows of its plots by percentiles; DepthBench (arXiv
    2609.32534) uses all tokens. Nothing is normalised here. Memory: the states of one batch, and those of one sequence
    in float64.

    Args:
        probe: the model.
        text: the text.
        tokens: `"all"` or `"last"`.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
    number = probe.num_layers + 1
    total = torch.zeros(number, number, dtype=torch.float64)
    states: list[Tensor] = []
    with probe.observe_states(lambda index, state: states.append(state if tokens == "all" else state[:, -1:])):
        for ids in text:
            states.clear()
            probe.logits(ids)
            for sequence in zip(*states, strict=True):
                directions = unit_vectors(torch.stack(sequence, dim=1).double())  # [T, L + 1, D]
                cosines = torch.bmm(directions, directions.transpose(1, 2)).clamp(-1, 1)
                total += cosines.arccos().sum(dim=0).cpu()
    num_tokens = text.num_tokens if tokens == "all" else text.num_sequences
    distances = torch.where(torch.ones_like(total).triu(1).bool(), total / (num_tokens * math.pi), torch.nan)
    return AngularDistance(tokens=tokens, distances=distances, adjacent=distances.diagonal(1).clone())


METRICS = {"angular_distance": DepthMetric(angular_distance, lambda probe: 2.0, True)}
