"""Magnitude of states, sublayer outputs and block sums, in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.state_means import mean_over_tokens, rms, sublayer_names
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputMagnitude(MetricResult):
    """Result of `output_magnitude`: root mean squares over channels, averaged over tokens.

    Attributes:
        states: [L + 1], magnitude of z_l.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: magnitude of the sublayer outputs y.
        sources: with AttnRes, magnitude of every source of the output site (embedding, blocks); else `None`.
    """

    states: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor
    sources: Tensor | None


@depth_metric
def output_magnitude(probe: DepthProbe, text: TextBatches) -> OutputMagnitude:
    """Measure the magnitude of states, sublayer outputs and block sums (AttnRes, arXiv 2603.15031, Fig. 5).

        M_l = mean_t sqrt(mean_c z_l[t, c]^2)

    Args:
        probe: the model.
        text: the text.
    """
    sources: list[float] = []

    def see(site: nn.Module, args: tuple[Any, ...]) -> None:
        found = [rms(source.double()).sum().item() for source in (*args[0].sources, args[0].open_block)]
        sources[:] = [a + b for a, b in zip(sources, found, strict=True)] if sources else found

    if not probe.mixes_sources:
        states, sublayers = mean_over_tokens(probe, text, rms)
        return OutputMagnitude(states=states, sublayer_names=sublayer_names(probe), sublayers=sublayers, sources=None)
    with probe.layers[-1].out_depth.register_forward_pre_hook(see):
        states, sublayers = mean_over_tokens(probe, text, rms)
    return OutputMagnitude(
        states=states,
        sublayer_names=sublayer_names(probe),
        sublayers=sublayers,
        sources=torch.tensor(sources, dtype=torch.float64) / text.num_tokens,
    )


METRICS = {"output_magnitude": DepthMetric(output_magnitude, lambda probe: 1.2, True)}
