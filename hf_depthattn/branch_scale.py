"""The learned scale of a sublayer's output, as ReZero and LayerScale have it."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .residual_connection import ResidualSite


class BranchScale(nn.Module):
    """Multiplies the output of a sublayer by a learned scale.

    It is a module of its own, because offloading and FSDP2 materialise parameters only during the forward of the
    module that has them.

    Args:
        size: size of the scale, 1 or D.
    """

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size, dtype=torch.float32))

    def forward(self, output: Tensor) -> Tensor:
        """Return the scaled output `[B, T, D]`, in float32 for a model in half precision."""
        return self.scale * output


class ScaledBranchSite(ResidualSite):
    """Base class of connections that add a scaled output to the residual stream.

    Args:
        config: the model's config.
        site: sublayer number, or `config.num_sublayers` for the output site, which has no scale.
        size: size of the scale, 1 or D.
        initial_scale: initial value of the scale, if `config.branch_scale_init` is `None`.
    """

    def __init__(self, config: DepthAttnConfig, site: int, size: int, initial_scale: float):
        super().__init__(config, site)
        chosen = config.branch_scale_init
        self.initial_scale = float(initial_scale if chosen is None else chosen)
        self.branch = BranchScale(size) if site < config.num_sublayers else None

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        assert self.branch is not None, "the output site has no sublayer"
        partial = state.partial + self.branch(output)
        return state._replace(partial=partial.to(state.partial.dtype))

    def init_parameters(self, init: ModuleType) -> None:
        if self.branch is not None:
            init.constant_(self.branch.scale, self.initial_scale)
