"""Attention Residuals as a depth connection."""

from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from .attn_res_ops import AttnResInputs
from .attn_res_pull_ops import attn_res_read_tapped, tap
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_options import DepthActivation, QueryType, ReadScale
from .depth_state import DepthState
from .float32_module import Float32Module

_T = TypeVar("_T")


class AttnResSite(DepthSite):
    r"""Attention Residuals, Full and Block (arXiv 2603.15031, Eq. 2-6).

    `h = read_scale * sum_i softmax_i(query . RMSNorm(v_i)) v_i` over the finished sources and the open block:

        site s, S = sublayers per block

        sources  (v_0 = embedding, v_1, ... )  ----+
        partial  (sum of the open block)  ---------+--> mix with `query`, `key_norm` --> h --> sublayer --> y
                                                                                                            |
          s % S == 0 : push partial to sources, partial = y     <-------------------------------------------+
          otherwise  : partial = partial + y                    <-------------------------------------------+

    At a block boundary, `partial` is the finished block, which the next write pushes to `sources`, so that a read of
    `sources + (partial,)` sees every finished block. At site 0 it is the embedding: the read is the identity, and its
    query gets a gradient of exactly zero.

    Parameters (float32, never weight-decayed):
        query `[D]`: zeros, so that initial reads are uniform.
        key_norm.weight `[D]`: ones; absent with `key_norm=False`.
        query_proj.weight `[D, D]`: zeros; with `query="input"` only, applied to the RMS-normalised newest source.
        mix_scores `[num_depth_heads, sources]`: zeros; with `static_mix=True` only, instead of all of the above.
    """

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        hidden_size = config.hidden_size
        self.starts_block = site % config.block_size_sublayers == 0
        self.eps = float(config.depth_norm_eps)
        self.activation = str(config.depth_activation)
        self.num_depth_heads = config.num_depth_heads
        self.window = config.depth_window
        self.sums_sources = config.read_scale == ReadScale.SUM
        num_sources = config.num_sources(site)
        if self.window is not None:
            num_sources = min(num_sources, self.window + 1)
        self.query = self.key_norm = self.query_proj = self.mix_scores = None
        if config.static_mix:
            self.mix_scores = nn.Parameter(torch.zeros(self.num_depth_heads, num_sources, dtype=torch.float32))
            return
        self.query = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        if config.key_norm:
            self.key_norm = DepthKeyNorm(hidden_size)
        if config.query == QueryType.INPUT:
            self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False, dtype=torch.float32)

    def begin(self, embeddings: Tensor) -> DepthState:
        return DepthState(sources=(), partial=tap(embeddings))

    def forward(self, state: DepthState, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        sources = self.visible((*state.sources, state.partial))
        read_scale = float(len(sources)) if self.sums_sources else 1.0
        # A single source has weight 1 with every activation; the softmax of one score is 1 with gradient 0.
        activation = DepthActivation.SOFTMAX if len(sources) == 1 else self.activation
        if self.mix_scores is not None:
            return self._static_read(sources, activation, read_scale, return_weights)
        inputs = AttnResInputs(
            sources,
            self._score_weight(sources[-1]),
            eps=self.eps,
            normalize_keys=self.key_norm is not None,
            activation=str(activation),
            num_depth_heads=self.num_depth_heads,
            read_scale=read_scale,
        )
        return attn_res_read_tapped(inputs, return_weights=return_weights)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        # Under autocast, sublayers return bfloat16 while the embedding is float32: all sources have the embedding's
        # dtype.
        output = output.to(state.partial.dtype)
        if self.starts_block:
            return state._replace(sources=(*state.sources, state.partial), partial=tap(output))
        return state._replace(partial=tap(state.partial + output))

    def init_parameters(self, init: ModuleType) -> None:
        for parameter in (self.query, self.mix_scores):
            if parameter is not None:
                init.zeros_(parameter)
        if self.query_proj is not None:
            init.zeros_(self.query_proj.weight)
        if self.key_norm is not None:
            init.ones_(self.key_norm.weight)

    def visible(self, sources: tuple[_T, ...]) -> tuple[_T, ...]:
        """Return the sources that the site reads: all, or with a window the first and the newest ones.

        Args:
            sources: all sources before the site, or anything in their order, oldest first.
        """
        if self.window is None or len(sources) <= self.window + 1:
            return sources
        return (sources[0], *sources[-self.window :])

    def _score_weight(self, newest: Tensor) -> Tensor:
        """Return the query times the key-norm weight: `[D]`, or `[B, T, D]` with an input-dependent query."""
        assert self.query is not None, "static scores have no query"
        weight: Tensor = self.query
        if self.query_proj is not None:
            # Scores are computed in float32, also under autocast.
            with torch.autocast(device_type=newest.device.type, enabled=False):
                normalised = nn.functional.rms_norm(newest.to(weight.dtype), newest.shape[-1:], eps=self.eps)
                weight = weight + self.query_proj(normalised)
        return weight if self.key_norm is None else self.key_norm(weight)

    def _static_read(
        self, sources: tuple[Tensor, ...], activation: str, read_scale: float, return_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if activation == DepthActivation.SOFTMAX:
            weights = self.mix_scores.softmax(dim=-1)  # [H, N]
        else:
            weights = self.mix_scores.sigmoid() * (2 / len(sources))
        mixed = sum(
            (read_scale * weights[:, i, None]) * source.unflatten(-1, (self.num_depth_heads, -1))
            for i, source in enumerate(sources)
        )  # [B, T, H, D/H]
        h = mixed.flatten(-2).to(sources[0].dtype)
        return h, weights.detach().expand(*h.shape[:-1], *weights.shape) if return_weights else None


class DepthKeyNorm(Float32Module):
    """Weight of the RMSNorm on depth keys, multiplied into the query: `query . (weight * k) = (query * weight) . k`.

    The normalisation itself is part of the read (`attn_res_read`). The multiplication is in this module's `forward`
    because offloading and FSDP2 materialise a module's parameters only during its own forward.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=torch.float32))

    def forward(self, query: Tensor) -> Tensor:
        return query * self.weight
