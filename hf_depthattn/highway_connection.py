"""Highway networks as a depth connection: a learned gate between the residual stream and the sublayer's output."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_options import HighwayGateType
from .depth_state import DepthState
from .residual_connection import ResidualSite


class HighwayGate(nn.Module):
    """The gate of a sublayer, `sigmoid(W h + b)`, computed in float32 at least, also under autocast.

    Args:
        hidden_size: size of the stream, D.
        num_gates: 1 or D.
    """

    def __init__(self, hidden_size: int, num_gates: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_gates, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_gates, dtype=torch.float32))

    def forward(self, stream: Tensor) -> Tensor:
        """Return the gates of the stream `[B, T, D]`, `[B, T, 1]` or `[B, T, D]`."""
        # FSDP2 may pass the weights in half precision.
        dtype = torch.promote_types(stream.dtype, torch.float32)
        with torch.autocast(device_type=stream.device.type, enabled=False):
            return nn.functional.linear(stream.to(dtype), self.weight.to(dtype), self.bias.to(dtype)).sigmoid()


class HighwaySite(ResidualSite):
    """Highway networks (arXiv 1505.00387, Eq. 3): `h_{s+1} = (1 - g) h_s + g f_s(h_s)` with `g = sigmoid(W h_s + b)`.

        partial ----+----------------> h --> sublayer --> y
           ^        |                                     |
           |        +--> g = sigmoid(W partial + b)       |
           +-- (1 - g) * partial + g * y <----------------+

    The gate reads the residual stream before the host's norm. Every row of the depth-mixing matrix sums to 1.

    I/O per sublayer and token, with the sum fused: 4 D, since the gate reads the stream once more.

    Parameters (float32, never weight-decayed):
        gate.weight `[1, D]` with `highway_gate="token"`, `[D, D]` with `"channel"`: zeros.
        gate.bias `[1]` or `[D]`: `highway_bias_init`, below zero, so that initial layers pass on most of the stream.
        The output site has none.
    """

    starts_as_host = False
    inexact_reason = "it weights the residual stream and the outputs of sublayers, with weights that sum to 1"
    tag = "highway"
    paper = "Highway Networks: [arXiv 1505.00387](https://arxiv.org/abs/1505.00387)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return f"a highway network (one gate per {config.highway_gate})"

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        self.bias_init = float(config.highway_bias_init)
        num_gates = config.hidden_size if config.highway_gate == HighwayGateType.CHANNEL else 1
        self.gate = HighwayGate(config.hidden_size, num_gates) if site < config.num_sublayers else None

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        assert self.gate is not None, "the output site has no sublayer"
        stream = state.partial
        mixed = stream + self.gate(stream) * (output - stream)
        return state._replace(partial=mixed.to(stream.dtype))

    def init_parameters(self, init: ModuleType) -> None:
        if self.gate is not None:
            init.zeros_(self.gate.weight)
            init.constant_(self.gate.bias, self.bias_init)
