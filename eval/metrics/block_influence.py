"""How much each layer changes the direction of the state, in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.state_means import cosine, observe
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInfluence(MetricResult):
    """Result of `block_influence`.

    Attributes:
        scores: [L], BI of each layer.
    """

    scores: Tensor


@depth_metric
def block_influence(probe: DepthProbe, text: TextBatches) -> BlockInfluence:
    """Measure how much a layer changes the direction of the state (ShortGPT, arXiv 2403.03853).

        BI_l = 1 - mean_t cos(z_l, z_{l+1})

    A poor proxy for importance (arXiv 2605.14075).

    Args:
        probe: the model.
        text: the text.
    """
    total = torch.zeros(probe.num_layers, dtype=torch.float64)
    before: list[Tensor] = []

    def see(index: int, state: Tensor) -> None:
        state = state.double()
        if index:
            total[index - 1] += cosine(before[0], state).sum().item()
        before[:] = [state]

    observe(probe, text, see)
    return BlockInfluence(scores=1 - total / text.num_tokens)


METRICS = {"block_influence": DepthMetric(block_influence, lambda probe: 1.2, True)}
