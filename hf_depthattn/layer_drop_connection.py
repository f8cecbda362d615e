"""LayerDrop as a depth connection: in training, sublayers are dropped at random."""

import torch
from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .residual_connection import ResidualSite


class LayerDropSite(ResidualSite):
    """LayerDrop (arXiv 1909.11556) per sublayer: in training `h_{s+1} = h_s + b_s f_s(h_s) / (1 - q)`, else the host.

        partial (residual stream) ----> h --> sublayer --> y
            ^                                              |
            +------ partial = partial + b / (1 - q) * y <--+

    `b_s` is 1 with probability `1 - q`, else 0; it is drawn for every sublayer and batch. The scale keeps the expected
    sum, as in stochastic depth (arXiv 1603.09382); the paper drops whole layers and does not scale. Dropped sublayers
    still run, so this saves no time; their gradients are zeros, and a dropped attention still writes MoDA's slot.

    I/O per sublayer and token: 3 D, as much as a residual sum. No parameters.
    """

    starts_as_host = True
    tag = "layer-drop"
    paper = "LayerDrop: [arXiv 1909.11556](https://arxiv.org/abs/1909.11556)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return f"LayerDrop (sublayers dropped with probability {config.layer_drop:g} in training)"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        self.drop_probability = float(config.layer_drop)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        if self.training and self.drop_probability > 0:
            kept = torch.rand(1, device=output.device) >= self.drop_probability
            output = output * (kept / (1 - self.drop_probability)).to(output.dtype)
        return super().write(state, output)
