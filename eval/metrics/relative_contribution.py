"""Updates relative to the state that they are added to, in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.state_means import SMALLEST_NORM, cosine, observe, sublayer_names
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class RelativeContribution(MetricResult):
    """Result of `relative_contribution`, averaged over tokens.

    Attributes:
        layers: [L], ||u_l|| / ||z_l|| with u_l = z_{l+1} - z_l.
        layer_cosines: [L], cos(u_l, z_l); negative if a layer reduces the state, positive if it reinforces it.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: ||y|| / ||h|| of each sublayer.
        sublayer_cosines: cos(y, h) of each sublayer.
    """

    layers: Tensor
    layer_cosines: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor
    sublayer_cosines: Tensor


@depth_metric
def relative_contribution(probe: DepthProbe, text: TextBatches) -> RelativeContribution:
    """Measure updates relative to the state that they are added to (EFF, arXiv 2505.13898).

        ||a_l + m_l|| / ||h_l||,  cos(a_l + m_l, h_l)       and for every sublayer ||y|| / ||h||, cos(y, h)

    Args:
        probe: the model.
        text: the text.
    """
    layers = torch.zeros(2, probe.num_layers, dtype=torch.float64)
    names = sublayer_names(probe)
    sublayers = torch.zeros(2, len(names), dtype=torch.float64)
    number = {name: index for index, name in enumerate(names)}
    before: list[Tensor] = []

    def add(table: Tensor, column: int, change: Tensor, stream: Tensor) -> None:
        ratio = change.norm(dim=-1) / stream.norm(dim=-1).clamp_min(SMALLEST_NORM)
        table[0, column] += ratio.sum().item()
        table[1, column] += cosine(change, stream).sum().item()

    def see(index: int, state: Tensor) -> None:
        state = state.double()
        if index:
            add(layers, index - 1, state - before[0], before[0])
        before[:] = [state]

    observe(probe, text, see, lambda sublayer, x, y: add(sublayers, number[sublayer.name], y.double(), x.double()))
    layers, sublayers = layers / text.num_tokens, sublayers / text.num_tokens
    return RelativeContribution(
        layers=layers[0],
        layer_cosines=layers[1],
        sublayer_names=names,
        sublayers=sublayers[0],
        sublayer_cosines=sublayers[1],
    )


METRICS = {"relative_contribution": DepthMetric(relative_contribution, lambda probe: 1.5, True)}
