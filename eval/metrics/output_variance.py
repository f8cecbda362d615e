"""Variance of states and sublayer outputs over channels, in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.state_means import mean_over_tokens, sublayer_names
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputVariance(MetricResult):
    """Result of `output_variance`.

    Attributes:
        states: [L + 1], variance of z_l.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: variance of the sublayer outputs y.
    """

    states: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor


@depth_metric
def output_variance(probe: DepthProbe, text: TextBatches) -> OutputVariance:
    """Measure the variance over channels, averaged over tokens (LNS, arXiv 2502.05795; CoD-S, arXiv 2603.15389).

        V_l = mean_t var_c(z_l[t, c])

    with the unbiased variance. CoD-S also logs it for attention and MLP outputs.

    Args:
        probe: the model.
        text: the text.
    """
    states, sublayers = mean_over_tokens(probe, text, lambda x: x.var(dim=-1))
    return OutputVariance(states=states, sublayer_names=sublayer_names(probe), sublayers=sublayers)


METRICS = {"output_variance": DepthMetric(output_variance, lambda probe: 1.2, True)}
