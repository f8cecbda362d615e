"""KEEL as a depth connection: a scaled residual stream that is normalised after every sum, on pre-norm hosts."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_state import DepthState
from .residual_connection import ResidualSite


class StreamNorm(nn.Module):
    """RMSNorm of the scaled stream plus the output of a sublayer, computed in float32 at least.

    Args:
        hidden_size: size of the stream, D.
        stream_scale: factor of the stream.
        eps: epsilon of the norm.
    """

    def __init__(self, hidden_size: int, stream_scale: float, eps: float):
        super().__init__()
        self.stream_scale = stream_scale
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))

    def forward(self, stream: Tensor, output: Tensor) -> Tensor:
        """Return the new stream `[B, T, D]`, in float32 for a model in half precision."""
        dtype = torch.promote_types(stream.dtype, torch.float32)
        total = self.stream_scale * stream.to(dtype) + output
        # FSDP2 may pass the weight in half precision.
        return nn.functional.rms_norm(total, stream.shape[-1:], self.weight.to(dtype), self.eps)


class KeelSite(ResidualSite):
    """KEEL (arXiv 2601.19895): `h_{s+1} = N_s(a h_s + f_s(norm(h_s)))` with `a = 2L`, the number of sublayers.

        partial ----> h --> pre-norm --> sublayer --> y
           ^                                          |
           +--------- N_s(a * partial + y) <----------+

    The host keeps its norms before sublayers and must have them. As in the released code, the first sublayer has a
    plain sum (`partial + y`), and the second has a norm but `a = 1`. On a host with norms after sublayers as well, the
    scheme is not that of the paper.

    I/O per sublayer and token, with the norm fused into the sum: 3 D.

    Parameters (float32, never weight-decayed):
        norm.weight `[D]`: ones. The first site and the output site have none. Its epsilon is `depth_norm_eps`.
    """

    starts_as_host = False
    inexact_reason = "it scales and normalises the residual stream"
    tag = "keel"
    paper = "KEEL: [arXiv 2601.19895](https://arxiv.org/abs/2601.19895)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return "KEEL (a scaled and normalised residual stream)"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        self.norm = None
        if 0 < site < config.num_sublayers:
            stream_scale = float(config.num_sublayers) if site > 1 else 1.0
            self.norm = StreamNorm(config.hidden_size, stream_scale, config.resolved_depth_norm_eps)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        if self.norm is None:
            return super().write(state, output)
        return state._replace(partial=self.norm(state.partial, output).to(state.partial.dtype))

    def init_parameters(self, init: ModuleType) -> None:
        if self.norm is not None:
            init.ones_(self.norm.weight)
