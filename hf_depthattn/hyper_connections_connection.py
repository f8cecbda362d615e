"""Hyper-Connections as a depth connection."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_options import StreamMix
from .stream_sites import StreamSite, StreamWeights

#: Initial scale of the part of the weights that depends on the streams (the paper).
INITIAL_SCALE = 0.01


class HyperConnectionWeights(StreamWeights):
    """The weights of Hyper-Connections (arXiv 2409.19606, Eq. 10-14).

    With `stream_mix="static"` they are `mixing` and `post` for every token. With `"dynamic"`, those of stream i are

        [a | A | b]_i = [mixing | post]_i + scale * tanh(proj LayerNorm(H_i))

    with one scale for `[a | A]` and one for `b`.

    Args:
        config: the model's config.
        site: sublayer number.
    """

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__()
        n, hidden_size = config.num_streams, config.hidden_size
        self.first_stream = site % n
        self.mixing = nn.Parameter(torch.zeros(n, n + 1, dtype=torch.float32))
        self.post = nn.Parameter(torch.ones(n, dtype=torch.float32))
        self.is_dynamic = config.stream_mix == StreamMix.DYNAMIC
        if self.is_dynamic:
            self.eps = config.resolved_depth_norm_eps
            self.norm_weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
            self.norm_bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
            self.proj = nn.Parameter(torch.zeros(n + 2, hidden_size, dtype=torch.float32))
            self.scale = nn.Parameter(torch.full((2,), INITIAL_SCALE, dtype=torch.float32))

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        n = self.post.shape[0]
        static = torch.cat([self.mixing, self.post.unsqueeze(-1)], -1).to(streams.dtype)  # [n, n + 2]
        if not self.is_dynamic:
            weights = static.expand(*streams.shape[:-2], n, n + 2)
        else:
            weight, bias, proj = (each.to(streams.dtype) for each in (self.norm_weight, self.norm_bias, self.proj))
            normed = nn.functional.layer_norm(streams, streams.shape[-1:], weight, bias, self.eps)
            scale = torch.cat([self.scale[:1].expand(n + 1), self.scale[1:]]).to(streams.dtype)
            weights = static + scale * nn.functional.linear(normed, proj).tanh()
        return weights[..., : n + 1], weights[..., n + 1]

    def init_parameters(self, init: ModuleType) -> None:
        n = self.post.shape[0]
        mixing = torch.eye(n, n + 1).roll(1, -1)
        mixing[self.first_stream, 0] = 1
        init.copy_(self.mixing, mixing)
        init.ones_(self.post)
        if self.is_dynamic:
            init.ones_(self.norm_weight)
            init.zeros_(self.norm_bias)
            init.zeros_(self.proj)
            init.constant_(self.scale, INITIAL_SCALE)


class HyperConnectionSite(StreamSite):
    r"""Hyper-Connections (arXiv 2409.19606, Eq. 2-14; Algorithm 2).

    `h = a^T H`, `H <- A^T H + b y^T` with n streams `H`, and their mean as the output (the paper sums them, which is
    the same up to the epsilon of the final norm):

        H [B, T, n, D] --> [a | A]^T H --+--> h --> sublayer --> y
                                         |                       |
        H <--------------------- A^T H --+ + b y^T <-------------+

    Parameters of a sublayer's site (float32, never weight-decayed), in `weights`:
        mixing `[n, n + 1]`: `[a | A]`; `a` one-hot at stream `site % n`, `A` the identity.
        post `[n]`: `b`; ones.
    and with `stream_mix="dynamic"`:
        norm_weight, norm_bias `[D]`: ones and zeros.
        proj `[n + 2, D]`: zeros, so that a model starts as its host. Its gradient is not zero.
        scale `[2]`: 0.01; of `[a | A]` and of `b`.

    In total n^2 + 2n, dynamic also (n + 4) D + 2. I/O per sublayer and token: (3n + 2) D fused, 14 D for n = 4.
    The output site has no parameters. All streams are equal at the start, and the model is its host to the bit.
    """

    host_condition = "the weights of its streams have their initial values"
    tag = "hyper-connections"
    paper = "Hyper-Connections: [arXiv 2409.19606](https://arxiv.org/abs/2409.19606)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return f"Hyper-Connections ({config.num_streams} streams, {config.stream_mix} weights)"

    def stream_weights(self, config: DepthAttnConfig, site: int) -> StreamWeights:
        return HyperConnectionWeights(config, site)
