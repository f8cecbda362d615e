"""mHC-lite as a depth connection."""

import math
from itertools import permutations

import torch
from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .mhc_connection import MHCWeights
from .stream_sites import StreamSite, StreamWeights


class MHCLiteWeights(MHCWeights):
    """The weights of mHC-lite (arXiv 2601.05732): those of mHC, with a mean of permutations as the mixing matrix.

        A = sum_r softmax_r(scale_2 proj_res x + base_res) P_r

    over all n! permutation matrices `P_r`, the identity first, in the order of `itertools.permutations`.
    """

    @property
    def num_mixing_logits(self) -> int:
        return math.factorial(self.num_streams)

    def mixing_matrix(self, logits: Tensor) -> Tensor:
        n = self.num_streams
        # Made here and not kept in a buffer, which would not be in a checkpoint.
        orders = torch.tensor(list(permutations(range(n))), device=logits.device)
        matrices = torch.nn.functional.one_hot(orders, n).to(logits.dtype)  # [n!, n, n]
        mean: Tensor = (matrices.flatten(1).t() @ logits.softmax(0)).unflatten(0, (n, n))
        return mean

    def identity_logits(self) -> list[int]:
        return [2 * self.num_streams]


class MHCLiteSite(StreamSite):
    r"""mHC-lite (arXiv 2601.05732): mHC whose mixing matrix is a mean of permutations (Birkhoff-von Neumann).

    `h = pre^T H`, `H <- A^T H + post y^T` with `A = sum_r w_r P_r`, which is doubly stochastic without iterations:

        H [B, T, n, D] --> RMSNorm(vec H) --> proj --> pre (sigmoid), post (2 sigmoid), w (softmax over n!)

        H --> [pre | A]^T H --+--> h --> sublayer --> y
                              |                       |
        H <---------- A^T H --+ + post y^T <----------+

    Parameters of a sublayer's site (float32, never weight-decayed), in `weights`; rows are pre, post, w:
        proj `[2n + n!, n D]`: zeros.
        base `[2n + n!]`: pre and post as in `MHCSite`; w 0 for the identity and -8 for other permutations.
        scale `[3]`: 0.01; of pre, post and w.

    In total (2n + n!) (n D + 1) + 3, 128 D for n = 4, the largest n. I/O per sublayer and token: (3n + 2) D fused,
    14 D for n = 4. The output site has no parameters and reads the mean. All streams are equal at the start, and the
    model is its host up to rounding.
    """

    host_condition = "the weights of its streams have their initial values"
    tag = "mhc-lite"
    paper = "mHC-lite: [arXiv 2601.05732](https://arxiv.org/abs/2601.05732)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        return f"mHC-lite ({config.num_streams} streams)"

    def stream_weights(self, config: DepthAttnConfig, site: int) -> StreamWeights:
        return MHCLiteWeights(config, site)
