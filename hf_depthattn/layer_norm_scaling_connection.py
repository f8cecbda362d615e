"""LayerNorm Scaling as a depth connection: inputs of sublayers are divided by the square root of their depth."""

import math

from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .residual_connection import ResidualSite


class LayerNormScalingSite(ResidualSite):
    """LayerNorm Scaling (arXiv 2502.05795): `h_{s+1} = h_s + f_s(norm(h_s) / sqrt(l))`, without parameters.

        partial (residual stream) --> h --> pre-norm --> x / sqrt(l) --> sublayer --> y
            ^                                                                         |
            +--------------------------- partial = partial + y <----------------------+

    `l = 1, 2, ...` is the decoder layer of the sublayer: both of its sublayers have the same scale. MoDA's slots of
    MLP sublayers are projections of the scaled input. The host must have norms before its sublayers; where it has
    norms after them as well, these cancel part of the scale.

    I/O per sublayer and token, with the scale fused into the norm: 3 D, as much as a residual sum.
    """

    starts_as_host = False
    inexact_reason = "it divides the normalised inputs of sublayers by the square root of their depth"
    tag = "layer-norm-scaling"
    paper = "LayerNorm Scaling, in The Curse of Depth: [arXiv 2502.05795](https://arxiv.org/abs/2502.05795)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "LayerNorm Scaling (sublayer inputs over the square root of their depth)"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        self.input_scale = 1 / math.sqrt(site // 2 + 1)

    def enter(self, x: Tensor) -> Tensor:
        return x * self.input_scale
