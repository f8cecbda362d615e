"""Delta Attention Residuals as a depth connection."""

from types import ModuleType

import torch
from torch import Tensor, nn

from .attn_res_ops import AttnResInputs, attn_res_read
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_state import Carried, DepthState


class DeltaSite(DepthSite):
    r"""Delta Attention Residuals (arXiv 2605.18855): the residual stream plus a gated read of all earlier outputs.

    `h = p + gate * sum_i softmax_i(query . RMSNorm(v_i)) v_i` with the residual sum `p` and the sources `v_i`: a
    learned vector `null`, the embedding, and the output of every sublayer so far:

        sources (null, embedding, y_0, y_1, ...) --> read --> * gate --+
                                                                       v
        partial (residual stream) ------------------------------------ + --> h --> sublayer --> y
           ^                                                                                    |
           +--- partial = partial + y, sources = sources + (y,)  <------------------------------+

    The read of site 0 sees `null` alone. The output site reads `p` and has no parameters.

    Parameters of a sublayer's site (float32, never weight-decayed), 3 D + 1:
        query `[D]`: zeros.
        key_norm `[D]`: ones.
        null `[D]`: zeros.
        gate `[1]`: zero, so that a model starts as its host. The paper's code calls it `alpha`; its other forms, such
            as no gate, do not start as the host, whose stream has no mean of the outputs added. At the start only the
            gate has a gradient other than zero, and at site 0 nothing has.

    With `num_depth_heads`, each head reads its own slice of the channels (multi-head attention residuals).
    I/O per sublayer and token: that of Full AttnRes plus D. `return_weights` gives the weights of the sources with
    `null` first.
    """

    starts_as_host = True
    embedding_source = 1
    host_condition = "the queries, gates and null sources of its reads are zero"
    tag = "delta-attention-residuals"
    paper = "Delta Attention Residuals: [arXiv 2605.18855](https://arxiv.org/abs/2605.18855)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        heads = "" if config.num_depth_heads == 1 else f" ({config.num_depth_heads} heads)"
        return f"Delta Attention Residuals{heads}"

    @classmethod
    def num_finished_sources(cls, config: DepthAttnConfig, site: int) -> int:
        return site + 1

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        hidden_size = config.hidden_size
        self.eps = config.resolved_depth_norm_eps
        self.num_depth_heads = config.num_depth_heads
        self.reads_sources = site < config.num_sublayers
        if self.reads_sources:
            self.query = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
            self.key_norm = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))
            self.null = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
            self.gate = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(
        self,
        state: DepthState,
        depth_reads: Carried | None = None,
        last_site: int | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        partial = state.partial
        if not self.reads_sources:
            return partial, state, None
        inputs = AttnResInputs(
            (self.null.to(partial.dtype).expand_as(partial), *state.sources),
            self.query * self.key_norm,
            eps=self.eps,
            num_depth_heads=self.num_depth_heads,
        )
        read, weights = attn_res_read(inputs, return_weights=return_weights)
        return torch.addcmul(partial, self.gate.to(partial.dtype), read), state, weights

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        # Under autocast, sublayers return bfloat16 while the embedding is float32: all sources have its dtype.
        output = output.to(state.partial.dtype)
        sources = state.sources or (state.partial,)
        return state._replace(sources=(*sources, output), partial=state.partial + output)

    def init_parameters(self, init: ModuleType) -> None:
        if self.reads_sources:
            init.zeros_(self.query)
            init.ones_(self.key_norm)
            init.zeros_(self.null)
            init.zeros_(self.gate)
