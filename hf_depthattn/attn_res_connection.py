"""Attention Residuals as a depth connection."""

from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from .attn_res_ops import AttnResInputs, attn_res_read
from .attn_res_phase1_ops import attn_res_phase1
from .attn_res_phase2_ops import attn_res_phase2
from .attn_res_reads import ReadWeights
from .attn_res_schedule import ReadGroup, last_site_of_group, supports_groups, uses_groups
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_options import DepthActivation, QueryType, ReadScale
from .depth_state import Carried, DepthState
from .kernels.attn_res_group_inputs import Phase2Inputs

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

    `query` and `key_norm` are rows of the model's `DepthReads`. A site itself has parameters (float32, never
    weight-decayed) with two options only:
        query_proj.weight `[D, D]`: zeros; with `query="input"`, applied to the RMS-normalised newest source.
        mix_scores `[num_depth_heads, sources]`: zeros; with `static_mix=True`, instead of query and key norm.
    """

    starts_as_host = True
    host_condition = "the queries are zero"
    tag = "attention-residuals"
    paper = "Attention Residuals: [arXiv 2603.15031](https://arxiv.org/abs/2603.15031)."

    @classmethod
    def describe(cls, config: DepthAttnConfig) -> str:
        size = config.block_size_sublayers
        return "Full Attention Residuals" if size == 1 else f"Block Attention Residuals ({size} sublayers per block)"

    @classmethod
    def num_finished_sources(cls, config: DepthAttnConfig, site: int) -> int:
        return config.num_sources(site) - 1

    @classmethod
    def live_sources(cls, config: DepthAttnConfig, site: int) -> tuple[int, ...]:
        num_finished = cls.num_finished_sources(config, site)
        # The newest source of the window is `partial`.
        oldest = 1 if config.depth_window is None else num_finished + 1 - config.depth_window
        return (0, *range(max(1, oldest), num_finished))

    @classmethod
    def partial_is_source(cls, config: DepthAttnConfig, site: int) -> bool:
        return site % config.block_size_sublayers == 0

    def __init__(self, config: DepthAttnConfig, site: int):
        super().__init__(config, site)
        hidden_size = config.hidden_size
        self.starts_block = site % config.block_size_sublayers == 0
        self.supports_groups = supports_groups(config)
        self.last_site_of_group = last_site_of_group(config, site)
        self.eps = config.resolved_depth_norm_eps
        self.activation = str(config.depth_activation)
        self.normalizes_keys = config.key_norm
        self.num_depth_heads = config.num_depth_heads
        self.window = config.depth_window
        self.sums_sources = config.read_scale == ReadScale.SUM
        num_sources = config.num_sources(site)
        if self.window is not None:
            num_sources = min(num_sources, self.window + 1)
        self.query_proj = self.mix_scores = None
        # Static scores are indexed by source.
        self.numbers_sources = config.static_mix
        if config.static_mix:
            self.mix_scores = nn.Parameter(torch.zeros(self.num_depth_heads, num_sources, dtype=torch.float32))
        elif config.query == QueryType.INPUT:
            self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False, dtype=torch.float32)

    def forward(
        self,
        state: DepthState,
        depth_reads: Carried | None = None,
        last_site: int | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        if self.mix_scores is not None:
            return self._static_read(state.settled(), return_weights)
        if depth_reads is None:
            raise ValueError(
                f"depth_reads: missing at site {self.site}; call the model instead of a layer, or pass the layer "
                "`depth_reads=read_weights(base_model.depth_reads, 'auto')` (`hf_depthattn.attn_res_reads`)."
            )
        weights: ReadWeights = depth_reads.value
        if self.supports_groups and not return_weights and uses_groups(weights.schedule, state.partial):
            return self._grouped_read(state, weights, last_site)
        return self._single_read(state.settled(), weights, return_weights)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        # Under autocast, sublayers return bfloat16 while the embedding is float32: all sources have the embedding's
        # dtype.
        output = output.to(state.partial.dtype)
        open_block = state.open_block
        if self.starts_block:
            return state._replace(sources=(*state.sources, open_block), partial=output, update=None)
        if state.group is None:
            return state._replace(partial=open_block + output, update=None)
        # The next read of the group adds it in its own pass.
        return state._replace(partial=open_block, update=output)

    def init_parameters(self, init: ModuleType) -> None:
        if self.mix_scores is not None:
            init.zeros_(self.mix_scores)
        if self.query_proj is not None:
            init.zeros_(self.query_proj.weight)

    def visible(self, sources: tuple[_T, ...]) -> tuple[_T, ...]:
        """Return the sources that the site reads: all, or with a window the first and the newest ones.

        Args:
            sources: all sources before the site, or anything in their order, oldest first.
        """
        if self.window is None or len(sources) <= self.window + 1:
            return sources
        return (sources[0], *sources[-self.window :])

    def inputs(self, sources: tuple[Tensor, ...], weights: ReadWeights) -> AttnResInputs:
        """Return the inputs of the site's read.

        Args:
            sources: the sources to be read, oldest first.
            weights: the weights of all reads.
        """
        # A single source has weight 1 with every activation; the softmax of one score is 1 with gradient 0.
        activation = DepthActivation.SOFTMAX if len(sources) == 1 else self.activation
        return AttnResInputs(
            sources,
            self._score_weight(weights, sources[-1]),
            eps=self.eps,
            normalize_keys=self.normalizes_keys,
            activation=str(activation),
            num_depth_heads=self.num_depth_heads,
            read_scale=self._read_scale(len(sources)),
        )

    def _read_scale(self, num_sources: int) -> float:
        return float(num_sources) if self.sums_sources else 1.0

    def _single_read(
        self, state: DepthState, weights: ReadWeights, return_weights: bool
    ) -> tuple[Tensor, DepthState, Tensor | None]:
        sources = self.visible((*state.sources, state.partial))
        h, depth_weights = attn_res_read(self.inputs(sources, weights), return_weights=return_weights)
        return h, state, depth_weights

    def _grouped_read(
        self, state: DepthState, weights: ReadWeights, last_site: int | None
    ) -> tuple[Tensor, DepthState, None]:
        if not state.sources:
            return state.partial, state, None
        group: ReadGroup | None = None if state.group is None else state.group.value
        # By site and not by a counter, so that a group stays right if layers are skipped.
        if group is None or not group.first_site <= self.site < group.first_site + len(group.score_weights):
            state, group = self._open_group(state, weights, last_site)
        read = self.site - group.first_site
        read_scale = self._read_scale(len(state.sources) + 1)
        newer = (*state.sources, state.partial)[group.num_covered :]
        if not newer:
            # The outputs of a group may be columns of one matrix, which `h` would keep as a whole.
            out = group.outs[read]
            return out.contiguous() if read_scale == 1.0 else out * read_scale, state, None
        prior = (group.outs[read], group.lses[read]) if group.outs else (None, None)
        h, newer = attn_res_phase2(
            Phase2Inputs(newer, group.score_weights[read], self.eps, read_scale, state.update, *prior)
        )
        sources = (*state.sources[: group.num_covered], *newer[:-1])
        return h, state._replace(sources=sources, partial=newer[-1], update=None), None

    def _open_group(
        self, state: DepthState, weights: ReadWeights, last_site: int | None
    ) -> tuple[DepthState, ReadGroup]:
        """Attend to the finished sources for all reads up to `last_site`."""
        if self.starts_block:
            state = state.settled()
        last_site = self.last_site_of_group if last_site is None else min(last_site, self.last_site_of_group)
        score_weights = weights.score_weights[self.site : last_site + 1]
        finished = (*state.sources, state.partial) if self.starts_block else state.sources
        outs: tuple[Tensor, ...] = ()
        lses: tuple[Tensor, ...] = ()
        num_covered = 0
        # One read alone is a single read: phase 2 without phase 1.
        if len(finished) > 1 and last_site > self.site:
            outs, lses, finished = attn_res_phase1(finished, score_weights, eps=self.eps)
            num_covered = len(finished)
            partial = finished[-1] if self.starts_block else state.partial
            state = state._replace(sources=finished[: len(state.sources)], partial=partial)
        group = ReadGroup(self.site, num_covered, score_weights.unbind(0), outs, lses)
        return state._replace(group=Carried(group)), group

    def _score_weight(self, weights: ReadWeights, newest: Tensor) -> Tensor:
        """Return the query times the key-norm weight: `[D]`, or `[B, T, D]` with an input-dependent query."""
        weight = weights.score_weights[self.site]
        if self.query_proj is None:
            return weight
        # Scores are computed in float32, also under autocast.
        with torch.autocast(device_type=newest.device.type, enabled=False):
            normalised = nn.functional.rms_norm(newest.to(weight.dtype), newest.shape[-1:], eps=self.eps)
            projected: Tensor = self.query_proj(normalised)
        return weight + (projected if weights.key_norm is None else projected * weights.key_norm[self.site])

    def _static_read(self, state: DepthState, return_weights: bool) -> tuple[Tensor, DepthState, Tensor | None]:
        sources = self.visible((*state.sources, state.partial))
        if len(sources) == 1 or self.activation == DepthActivation.SOFTMAX:
            weights = self.mix_scores.softmax(dim=-1)  # [H, N]
        else:
            weights = self.mix_scores.sigmoid() * (2 / len(sources))
        read_scale = self._read_scale(len(sources))
        mixed = sum(
            (read_scale * weights[:, i, None]) * source.unflatten(-1, (self.num_depth_heads, -1))
            for i, source in enumerate(sources)
        )  # [B, T, H, D/H]
        h = mixed.flatten(-2).to(sources[0].dtype)
        return h, state, weights.detach().expand(*h.shape[:-1], *weights.shape) if return_weights else None
