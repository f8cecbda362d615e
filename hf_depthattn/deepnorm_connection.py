"""DeepNorm as a depth connection: Post-LN with a scaled residual stream and smaller initial weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .deepnorm_projections import ATTENTION_PROJECTIONS, MLP_PROJECTIONS, scaled_weights
from .depth_state import DepthState
from .residual_connection import ResidualSite


class DeepNormSite(ResidualSite):
    """DeepNorm (arXiv 2203.00555): `h_{s+1} = norm(a h_s + f_s(h_s))` with `a = (2L)^(1/4)`.

        partial ----> h --> sublayer --> y
           ^                             |
           +-- norm(a * partial + y) <---+

    L is the number of decoder layers. The norm is the host's, moved after the sum by `norm_position="post"`, which
    the connection requires. Initial weights of the value and output projections and of the matrices of MLPs are those
    of the host times `(8L)^(-1/4)`; queries and keys are not scaled. No other parameters.

    I/O per sublayer and token: 3 D for the scaled sum, and the norm of the stream.
    """

    starts_as_host = False
    inexact_reason = "its norms come after the sums, and it scales the residual stream"
    tag = "deepnorm"
    paper = "DeepNet: [arXiv 2203.00555](https://arxiv.org/abs/2203.00555)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "DeepNorm (Post-LN with a scaled residual stream)"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        num_layers = config.num_sublayers // 2
        self.stream_scale = (2 * num_layers) ** 0.25
        self.weight_scale = (8 * num_layers) ** -0.25
        self.projections = MLP_PROJECTIONS if site % 2 else ATTENTION_PROJECTIONS

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        return state._replace(partial=self.stream_scale * state.partial + output)

    @torch.no_grad()
    def init_sublayer(self, modules: Sequence[nn.Module]) -> None:
        for module in modules:
            for weight in scaled_weights(module, self.projections):
                # A weight with this mark comes from a checkpoint.
                if not getattr(weight, "_is_hf_initialized", False):
                    weight.mul_(self.weight_scale)
