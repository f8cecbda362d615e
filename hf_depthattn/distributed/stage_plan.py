"""The plan of pipeline stages: which tensors each stage receives, takes from its rank's cache and hands on.

A rank of a pipeline holds one stage or several (virtual stages). With cross-stage caching (Attention Residuals, arXiv
2603.15031, section 4.1), a rank keeps what its stages have received or made for its later stages, so that a boundary
carries the partial sum and only the sources that the next rank has not seen. Slots of MoDA, the first values of a
value residual and router logits follow the same rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..configuration_depthattn import DepthAttnConfig
from .depth_items import StateItem, item_channels, items_read, state_items


@dataclass(frozen=True)
class StagePlan:
    """What one stage does with the items of the depth state, for every microbatch.

    Attributes:
        index: number of the stage.
        num_stages: number of stages.
        rank: rank of the pipeline that holds the stage.
        layers: the decoder layers of the stage.
        received: items that arrive from the stage before, in this order.
        cached: items that it takes from the cache of its rank, in this order after `received`.
        gives: items that it hands on to the next stage, in this order; what that stage receives.
        kept: items that it has and that later stages of its rank take from the cache.
        owned: items that it is the first on its rank to have. The stage returns their gradients to the stage before,
            or to itself for those that it has made, summed over all stages of the rank.
        last_read: cached items that no later stage of its rank takes, so that the cache drops them after this stage.
        first_on_rank: whether it is the first stage of its rank.
    """

    index: int
    num_stages: int
    rank: int
    layers: range
    received: tuple[StateItem, ...]
    cached: tuple[StateItem, ...]
    gives: tuple[StateItem, ...]
    kept: tuple[StateItem, ...]
    owned: tuple[StateItem, ...]
    last_read: tuple[StateItem, ...]
    first_on_rank: bool

    @property
    def takes(self) -> tuple[StateItem, ...]:
        """The items that the stage begins with: first those received, then those from the cache."""
        return (*self.received, *self.cached)

    @property
    def is_first(self) -> bool:
        """Whether it is the stage of the embeddings."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it is the stage of the head."""
        return self.index == self.num_stages - 1


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Split decoder layers evenly; the first stages get one more if there is a remainder.

    Args:
        num_layers: number of layers.
        num_stages: number of stages.

    Raises:
        ValueError: if a stage would have no layer.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"num_stages: {num_stages} must be between 1 and {num_layers}, the number of decoder layers.")
    size, rest = divmod(num_layers, num_stages)
    starts = [stage * size + min(stage, rest) for stage in range(num_stages + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def loop_ranks(num_ranks: int, num_virtual: int) -> list[int]:
    """Return the rank of every stage for looped schedules: stage s is on rank `s % num_ranks`.

    Args:
        num_ranks: number of ranks, P.
        num_virtual: number of stages per rank, V; 1 for GPipe and 1F1B.
    """
    return list(range(num_ranks)) * num_virtual


def v_ranks(num_ranks: int) -> list[int]:
    """Return the rank of every stage for V schedules (ZBV, DualPipeV): 0, 1, ..., P - 1, P - 1, ..., 1, 0.

    Args:
        num_ranks: number of ranks, P.
    """
    return [*range(num_ranks), *reversed(range(num_ranks))]


def plan_stages(
    config: DepthAttnConfig,
    layers: Sequence[range],
    ranks: Sequence[int],
    *,
    cross_stage_cache: bool = True,
    routers: Sequence[int] = (),
) -> list[StagePlan]:
    """Return the plan of every stage.

    Args:
        config: the model's config.
        layers: the decoder layers of every stage, as from `split_layers`.
        ranks: the rank of every stage in the pipeline, as the schedule places them.
        cross_stage_cache: whether ranks keep items for their later stages; otherwise every boundary carries the whole
            state.
        routers: the layers whose router logits the loss uses; empty without an auxiliary loss.

    Raises:
        ValueError: if the layers are not all of the model's, in order, with at least one per stage, or if there is not
            one rank per stage.
    """
    layers, ranks = list(layers), list(ranks)
    _check(config, layers, ranks)
    stages = range(len(layers))
    alive: list[tuple[StateItem, ...]] = [(), *(state_items(config, each.start, routers) for each in layers[1:]), ()]
    received, cached = _arrivals(config, layers, ranks, alive, cross_stage_cache)
    gives = [*received[1:], ()]
    plans = []
    for stage in stages:
        on_rank = [other for other in stages if ranks[other] == ranks[stage]]
        had = {item for s in on_rank if s < stage for item in (*received[s], *cached[s], *gives[s])}
        later = {item for s in on_rank if s > stage for item in cached[s]}
        has = tuple(dict.fromkeys((*received[stage], *cached[stage], *gives[stage])))
        plans.append(
            StagePlan(
                index=stage,
                num_stages=len(layers),
                rank=ranks[stage],
                layers=layers[stage],
                received=received[stage],
                cached=cached[stage],
                gives=gives[stage],
                kept=tuple(item for item in has if item in later),
                owned=tuple(item for item in has if item not in had),
                last_read=tuple(item for item in cached[stage] if item not in later),
                first_on_rank=stage == on_rank[0],
            )
        )
    return plans


def _check(config: DepthAttnConfig, layers: list[range], ranks: list[int]) -> None:
    num_layers = config.host_config.num_hidden_layers
    covered = [layer for each in layers for layer in each]
    if not all(layers) or covered != list(range(num_layers)):
        given = ", ".join(f"{each.start}-{each.stop - 1}" if each else "none" for each in layers)
        raise ValueError(
            f"layers: the stages have {given}; they must have the layers 0 to {num_layers - 1} in order, at least one "
            "each."
        )
    if len(ranks) != len(layers):
        raise ValueError(f"ranks: {len(ranks)} ranks for {len(layers)} stages; give one per stage.")


def _arrivals(
    config: DepthAttnConfig,
    layers: list[range],
    ranks: list[int],
    alive: list[tuple[StateItem, ...]],
    cross_stage_cache: bool,
) -> tuple[list[tuple[StateItem, ...]], list[tuple[StateItem, ...]]]:
    """Return what each stage receives, and what it takes from its rank's cache."""
    received: list[tuple[StateItem, ...]] = []
    seen: dict[int, set[StateItem]] = {rank: set() for rank in ranks}
    for stage, rank in enumerate(ranks):
        # Stages in succession on one rank pass tensors by reference.
        passes_all = not cross_stage_cache or (stage > 0 and ranks[stage - 1] == rank)
        received.append(tuple(item for item in alive[stage] if passes_all or item not in seen[rank]))
        seen[rank].update(alive[stage], alive[stage + 1])
    cached = []
    for stage, at_entry in enumerate(alive[:-1]):
        handed_on = received[stage + 1] if stage + 1 < len(received) else ()
        needed = {*items_read(config, at_entry, layers[stage]), *handed_on}
        cached.append(tuple(item for item in at_entry if item in needed and item not in received[stage]))
    return received, cached


def boundary_channels(config: DepthAttnConfig, plans: Sequence[StagePlan]) -> list[int]:
    """Return the number of elements per token that cross each boundary between stages, 0 within a rank.

    The gradients that return are as many, but for items that no parameter before the boundary needs.

    Args:
        config: the model's config.
        plans: the plan of every stage.
    """
    return [
        0 if before.rank == after.rank else sum(item_channels(config, item) for item in after.received)
        for before, after in pairwise(plans)
    ]
