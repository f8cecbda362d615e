"""Manifold-Constrained Hyper-Connections as a depth connection."""

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .sinkhorn_ops import sinkhorn
from .stream_sites import StreamSite, StreamWeights

#: Initial scale of the part of the weights that depends on the streams, initial weight of the stream that a sublayer
#: reads most, and initial logit of what is not on the diagonal of the mixing matrix.
INITIAL_SCALE = 0.01
INITIAL_READ = 0.9
INITIAL_OFF_DIAGONAL = -8.0


class MHCWeights(StreamWeights):
    """The weights of mHC (arXiv 2512.24880, Eq. 7-9), from all streams `x = RMSNorm(vec H)` `[n D]` of a token.

        pre  = sigmoid(scale_0 proj_pre x + base_pre)             [n]
        post = 2 sigmoid(scale_1 proj_post x + base_post)         [n]
        A    = Sinkhorn(scale_2 proj_res x + base_res)            [n, n]

    Args:
        config: the model's config.
        site: sublayer number.
    """

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__()
        self.num_streams = n = config.num_streams
        self.first_stream = site % n
        self.eps = config.resolved_depth_norm_eps
        self.sinkhorn_iters = config.sinkhorn_iters
        num_weights = 2 * n + self.num_mixing_logits
        self.proj = nn.Parameter(torch.zeros(num_weights, n * config.hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros(num_weights, dtype=torch.float32))
        self.scale = nn.Parameter(torch.full((3,), INITIAL_SCALE, dtype=torch.float32))

    @property
    def num_mixing_logits(self) -> int:
        """Number of logits of the mixing matrix."""
        return self.num_streams**2

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        n, batch = self.num_streams, streams.shape[:-2]
        proj, base, scale = (each.to(streams.dtype) for each in (self.proj, self.base, self.scale))
        flat = streams.flatten(-2).flatten(0, -2)  # [tokens, n D]
        # The norm has no weight, so that the projection can come first. Tokens are last: there are few weights.
        rstd = (torch.linalg.vector_norm(flat, dim=-1).square() / flat.shape[-1] + self.eps).rsqrt()
        logits = (proj @ flat.t()) * rstd  # [weights, tokens]
        sizes = [n, n, self.num_mixing_logits]
        parts = zip(logits.split(sizes), base.split(sizes), scale.unbind(), strict=True)
        pre, post, res = (factor * part + offset.unsqueeze(-1) for part, offset, factor in parts)
        mixing = torch.cat([pre.sigmoid().unsqueeze(1), self.mixing_matrix(res)], 1)  # [n, n + 1, tokens]
        # Contiguous, because batched products copy matrices with other strides one by one.
        mixing = mixing.permute(2, 0, 1).contiguous()
        return mixing.unflatten(0, batch), (2 * post.sigmoid()).t().unflatten(0, batch)

    def mixing_matrix(self, logits: Tensor) -> Tensor:
        """Return the doubly stochastic matrices, `[n, n, tokens]`.

        Args:
            logits: `[num_mixing_logits, tokens]`.
        """
        return sinkhorn(logits.unflatten(0, (self.num_streams, -1)), self.sinkhorn_iters)

    def init_parameters(self, init: ModuleType) -> None:
        n = self.num_streams
        base = torch.zeros_like(self.base)
        # The weights of the read sum to 1, so that it is the host's stream, and are not equal: with equal ones, all
        # streams would get the same gradients and remain equal.
        base[:n] = _logit((1 - INITIAL_READ) / (n - 1))
        base[self.first_stream] = _logit(INITIAL_READ)
        base[2 * n :] = INITIAL_OFF_DIAGONAL
        base[self.identity_logits()] = 0
        init.copy_(self.base, base)
        init.zeros_(self.proj)
        init.constant_(self.scale, INITIAL_SCALE)

    def identity_logits(self) -> list[int]:
        """Return the rows of `base` that belong to the identity as the mixing matrix."""
        n = self.num_streams
        return [2 * n + i * (n + 1) for i in range(n)]


class MHCSite(StreamSite):
    r"""Manifold-Constrained Hyper-Connections (mHC; arXiv 2512.24880, Eq. 3-9).

    `h = pre^T H`, `H <- A^T H + post y^T` with n streams `H`, where `A` is doubly stochastic, and `pre` and `post` are
    not negative, so that sums over streams neither grow nor vanish with depth. The output is the mean of the streams:

        H [B, T, n, D] --> RMSNorm(vec H) --> proj --> pre (sigmoid), post (2 sigmoid), A (Sinkhorn)

        H --> [pre | A]^T H --+--> h --> sublayer --> y
                              |                       |
        H <---------- A^T H --+ + post y^T <----------+

    Sinkhorn normalises rows and columns in turn and ends with the columns of `A`, which `A^T H` sums: these sums are
    exact. (The paper ends with the rows.)

    Parameters of a sublayer's site (float32, never weight-decayed), in `weights`; rows are pre, post, A by rows:
        proj `[n^2 + 2n, n D]`: zeros.
        base `[n^2 + 2n]`: pre 0.9 at stream `site % n` and `0.1 / (n - 1)` elsewhere (as logits), post 0; A 0 on
            the diagonal and -8 elsewhere.
        scale `[3]`: 0.01; of pre, post and A.

    In total (n^2 + 2n) (n D + 1) + 3, 96 D for n = 4. I/O per sublayer and token: (3n + 2) D fused, 14 D for n = 4.
    The output site has no parameters. All streams are equal at the start, and the model is its host up to rounding.
    """

    host_condition = "the weights of its streams have their initial values"
    tag = "mhc"
    paper = "mHC: Manifold-Constrained Hyper-Connections: [arXiv 2512.24880](https://arxiv.org/abs/2512.24880)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return f"Manifold-Constrained Hyper-Connections ({config.num_streams} streams)"

    def stream_weights(self, config: DepthAttnConfig, site: int) -> StreamWeights:
        return MHCWeights(config, site)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
