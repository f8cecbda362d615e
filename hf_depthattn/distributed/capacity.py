"""Memory and traffic of a training step on many GPUs, from the config alone.

Every rank of a pipeline is a group of GPUs: `tensor` of them split each layer, `fsdp` of them split the states of the
parameters, and `data` copies of all that train on other data. Counted from plans and from the model's parameters:

- parameters, gradients and the optimizer: FSDP2 with mixed precision and AdamW keeps a share of float32 parameters,
  gradients and two moments, 16 bytes per parameter / `fsdp`. In a pipeline, torch keeps more until the end of a step:
  up to the whole bfloat16 parameters and float32 sums of gradients of the rank, 6 bytes per parameter, since backwards
  of single microbatches split neither (`torch.distributed.pipelining.stage`, `set_reshard_after_backward(False)`).
  Without a pipeline, only two layers, of which one is prefetched, and what is outside of layers are whole at a time;
- the depth state: what checkpointed layers keep of it for the microbatches in flight, a tensor counted once per rank.

Estimated:

- gradients of the depth state: as large as the state of one microbatch on the rank;
- the layer that is recomputed in the backward: the outputs of its matrices and their gradients;
- logits, in the last stage: in bfloat16 and float32, with their gradients.

Buffers of communication, the allocator's fragmentation and the workspace of kernels are not in the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..configuration_depthattn import DepthAttnConfig
from .depth_items import StateItem, item_channels, state_items
from .parameter_counts import ModelCount
from .schedule_order import rank_steps
from .stage_plan import StagePlan, boundary_channels, loop_ranks, plan_stages, split_layers

#: Bytes of an element of the depth state and of activations, bfloat16.
ACTIVATION_BYTES = 2
# Bytes per parameter: float32 parameter, gradient and two moments, split by FSDP2; bfloat16 parameter and float32
# gradient, whole.
_PARAMETER, _GRADIENT, _OPTIMIZER = 4, 4, 8
_WHOLE_PARAMETER, _WHOLE_GRADIENT = 2, 4
# Logits in bfloat16 and float32, and the gradients of both.
_LOGITS = 12


@dataclass(frozen=True)
class Axes:
    """How the GPUs are divided.

    Attributes:
        pipeline: ranks of a pipeline, P.
        num_virtual: stages per rank, V.
        tensor: GPUs that split every layer.
        fsdp: GPUs that split parameters, gradients and the optimizer (FSDP2); each trains on its own data.
        data: copies of all that.
    """

    pipeline: int
    num_virtual: int = 1
    tensor: int = 1
    fsdp: int = 1
    data: int = 1

    @property
    def num_gpus(self) -> int:
        """Number of GPUs."""
        return self.pipeline * self.tensor * self.fsdp * self.data


@dataclass(frozen=True)
class Workload:
    """One training step.

    Attributes:
        sequence_length: tokens per sequence.
        microbatch_size: sequences per microbatch.
        num_microbatches: microbatches per pipeline and step.
        schedule: a `CountedSchedule`.
    """

    sequence_length: int
    microbatch_size: int
    num_microbatches: int
    schedule: str

    @property
    def num_tokens(self) -> int:
        """Tokens per microbatch."""
        return self.sequence_length * self.microbatch_size


@dataclass(frozen=True)
class RankMemory:
    """Memory of one GPU of a pipeline rank, in bytes.

    Attributes:
        rank: the rank.
        layers: the decoder layers of its stages.
        num_parameters: parameters of its stages on this GPU, before FSDP2 splits them.
        parameters: its share in float32, and whole ones in bfloat16.
        gradients: its share, and whole sums over microbatches.
        optimizer: its share of AdamW's moments.
        depth_state: the depth state of the microbatches in flight, at its peak.
        state_gradients: estimate for the gradients of the depth state.
        layer: estimate for the layer that is recomputed.
        logits: estimate for logits and their gradients.
    """

    rank: int
    layers: tuple[range, ...]
    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    depth_state: int
    state_gradients: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        counted = self.parameters + self.gradients + self.optimizer + self.depth_state
        return counted + self.state_gradients + self.layer + self.logits


@dataclass(frozen=True)
class Capacity:
    """The plan of a training step.

    Attributes:
        axes: how the GPUs are divided.
        workload: the step.
        boundaries: bytes that cross each boundary between stages, per microbatch and direction; 0 within a rank.
        uncached_boundaries: the same if every boundary carried the whole depth state.
        ranks: memory of the ranks of a pipeline.
    """

    axes: Axes
    workload: Workload
    boundaries: tuple[int, ...]
    uncached_boundaries: tuple[int, ...]
    ranks: tuple[RankMemory, ...]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(rank.total for rank in self.ranks)

    @property
    def idle_share(self) -> float:
        """Share of a step in which a rank waits, if all stages take the same time and transfers none."""
        waits = self.axes.pipeline - 1
        return waits / (self.axes.num_virtual * self.workload.num_microbatches + waits)


def plan_capacity(
    config: DepthAttnConfig, count: ModelCount, axes: Axes, workload: Workload, routers: Sequence[int] = ()
) -> Capacity:
    """Return the plan of a training step.

    Args:
        config: the model's config.
        count: its parameters, with `axes.tensor` devices.
        axes: how the GPUs are divided.
        workload: the step.
        routers: the layers whose router logits the loss uses.

    Raises:
        ValueError: if a stage would have no layer, or the schedule does not fit the microbatches.
    """
    num_stages = axes.pipeline * axes.num_virtual
    layers = split_layers(config.host_config.num_hidden_layers, num_stages)
    ranks = loop_ranks(axes.pipeline, axes.num_virtual)
    plans = plan_stages(config, layers, ranks, routers=routers)
    uncached = plan_stages(config, layers, ranks, cross_stage_cache=False, routers=routers)
    per_channel = ACTIVATION_BYTES * workload.num_tokens
    memory = [_rank_memory(config, count, axes, workload, plans, rank) for rank in range(axes.pipeline)]
    return Capacity(
        axes,
        workload,
        tuple(channels * per_channel for channels in boundary_channels(config, plans)),
        tuple(channels * per_channel for channels in boundary_channels(config, uncached)),
        tuple(memory),
    )


def held_items(config: DepthAttnConfig, plan: StagePlan, plans: Sequence[StagePlan]) -> tuple[StateItem, ...]:
    """Return the items that a stage with checkpointed layers adds to its rank's memory, per microbatch in flight.

    These are what it has received from another rank, the entering states of its layers, and what it hands on.

    Args:
        config: the model's config.
        plan: the plan of the stage.
        plans: the plans of all stages.
    """
    # The embeddings are a source of some connections and the partial sum of others.
    entering = [StateItem("source", 0)] if plan.is_first else [*plan.takes]
    inner = [item for layer in plan.layers[1:] for item in state_items(config, layer)]
    items = dict.fromkeys((*entering, *inner, *plan.gives))
    from_own_rank = not plan.is_first and plans[plan.index - 1].rank == plan.rank
    held = set(plan.takes) if from_own_rank else set(plan.cached)
    return tuple(item for item in items if item not in held)


def _rank_memory(
    config: DepthAttnConfig,
    count: ModelCount,
    axes: Axes,
    workload: Workload,
    plans: Sequence[StagePlan],
    rank: int,
) -> RankMemory:
    own = [plan for plan in plans if plan.rank == rank]
    of_rank = count.rank(own)
    share = -(-of_rank.num_parameters // axes.fsdp)
    num_whole = of_rank.num_parameters
    if axes.pipeline == axes.num_virtual == 1:
        sizes = [layer.num_parameters for layer in count.layers]
        num_whole -= sum(sizes) - min(sum(sizes), 2 * max(sizes))
    per_channel = ACTIVATION_BYTES * workload.num_tokens
    channels = [sum(item_channels(config, item) for item in held_items(config, plan, plans)) for plan in own]
    in_flight = peak = 0
    for step in rank_steps(workload.schedule, rank, axes.pipeline, axes.num_virtual, workload.num_microbatches):
        in_flight += channels[step.chunk] if step.is_forward else -channels[step.chunk]
        peak = max(peak, in_flight)
    widest = max(count.layers[layer].output_channels for plan in own for layer in plan.layers)
    has_head = any(plan.is_last for plan in own)
    return RankMemory(
        rank=rank,
        layers=tuple(plan.layers for plan in own),
        num_parameters=of_rank.num_parameters,
        parameters=_PARAMETER * share + _WHOLE_PARAMETER * num_whole,
        gradients=_GRADIENT * share + _WHOLE_GRADIENT * num_whole,
        optimizer=_OPTIMIZER * share,
        depth_state=peak * per_channel,
        state_gradients=sum(channels) * per_channel,
        layer=2 * widest * per_channel,
        logits=_LOGITS * workload.num_tokens * config.vocab_size // axes.tensor if has_head else 0,
    )
