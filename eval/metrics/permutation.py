"""Permutation score: effect of swapping two layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches

PAIRS = ("adjacent", "all")


@dataclass(frozen=True, eq=False, kw_only=True)
class PermutationScores(MetricResult):
    """Result of `permutation_scores`.

    Attributes:
        pairs: `"adjacent"` or `"all"`.
        scores: [L, L], symmetric; NaN for pairs that were not swapped.
        loss_increase: [L, L], loss with the swap minus loss of the model, in nats; negative if the swap helps.
        num_pairs: number of swapped pairs.
        num_unfit_pairs: number of pairs skipped because their weights differ in shape (e.g. dense and MoE layers).
        mean: mean score of the swapped pairs.
        inner_mean: mean over pairs without the first and last layer; NaN if there are none.
        edge_mean: mean over pairs with the first or last layer, which dominate `mean`.
        loss: loss of the unchanged model.
    """

    pairs: str
    scores: Tensor
    loss_increase: Tensor
    num_pairs: int
    num_unfit_pairs: int
    mean: float
    inner_mean: float
    edge_mean: float
    loss: float


@depth_metric
def permutation_scores(probe: DepthProbe, text: TextBatches, *, pairs: str = "adjacent") -> PermutationScores:
    """Measure the relative change of the loss when two layers swap their learned weights (CoD-S, arXiv 2603.15389).

        P(i, j) = |Loss(i and j swapped) - Loss| / Loss

    Weights are swapped, not modules: attention patterns (`layer_types`) stay in place. With AttnRes, the site after a
    layer moves with it, while its own attention site stays (DepthBench, arXiv 2609.32534).

    Args:
        probe: the model.
        text: the text.
        pairs: `"adjacent"` (L - 1 passes) or `"all"` (L (L - 1) / 2 passes).
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {PAIRS}, got {pairs!r}")
    number = probe.num_layers
    increase = torch.full((number, number), torch.nan, dtype=torch.float64)
    candidates = list(
        itertools.combinations(range(number), 2) if pairs == "all" else itertools.pairwise(range(number))
    )
    fitting = [pair for pair in candidates if probe.can_swap(*pair)]
    # Layers before i are unchanged, since `i < j` in all pairs.
    loss, changed = probe.losses(text, [(i, partial(probe.swap, i, j)) for i, j in fitting])
    for (i, j), swapped in zip(fitting, changed, strict=True):
        increase[i, j] = increase[j, i] = swapped - loss
    scores = increase.abs() / loss
    inner = scores.clone()
    inner[[0, -1]] = torch.nan
    inner[:, [0, -1]] = torch.nan
    return PermutationScores(
        pairs=pairs,
        scores=scores,
        loss_increase=increase,
        num_pairs=len(fitting),
        num_unfit_pairs=len(candidates) - len(fitting),
        mean=scores.nanmean().item(),
        inner_mean=inner.nanmean().item(),
        edge_mean=scores[inner.isnan()].nanmean().item(),
        loss=loss,
    )


METRICS = {
    "permutation_adjacent": DepthMetric(permutation_scores, lambda probe: 1 + 0.5 * probe.num_layers, True),
    "permutation_all": DepthMetric(
        partial(permutation_scores, pairs="all"),
        # On average the earlier layer of a pair is at a third of the depth.
        lambda probe: 1 + probe.num_layers * (probe.num_layers - 1) / 3,
        False,
    ),
}
