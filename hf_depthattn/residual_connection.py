"""The residual stream as a depth connection, for MoDA alone or as a baseline."""

from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_state import Carried, DepthState


class ResidualSite(DepthSite):
    """The host's residual stream, `h_l = h_1 + sum_{i<l} f_i(h_i)`, without parameters.

    partial (residual stream) ----> h --> sublayer --> y
        ^                                              |
        +------------- partial = partial + y <---------+
    """

    starts_as_host = True

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        is_control = config.depth_kv is None and not config.value_residual
        return "plain residual sums" + (" (the control)" if is_control else "")

    def forward(
        self,
        state: DepthState,
        depth_reads: Carried | None = None,
        last_site: int | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        return state.partial, state, None

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        return state._replace(partial=state.partial + output)
