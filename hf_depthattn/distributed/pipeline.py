"""A causal LM in pipeline stages: build the stages of a rank and their schedule, and train.

device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.accelerator.set_device_index(device.index)
dist.init_process_group()
pipeline = build_pipeline("checkpoint", "Interleaved1F1B", num_microbatches=8, device=device)
optimizer = torch.optim.AdamW(pipeline.parameters())
for input_ids, labels in batches:
    loss = pipeline.step(input_ids.to(device), labels.to(device))
    pipeline.clip_grad_norm(1.0)
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import ScheduleDualPipeV, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from transformers import PreTrainedModel

from ..configuration_depthattn import DepthAttnConfig
from ..modeling_depthattn import DepthAttnForCausalLM
from ..utils.eval_mode import eval_mode
from ..utils.text_table import few
from .shared_parameters import clip_grad_norm, model_of, shared_parameters, sum_shared_gradients
from .stage_adapter import adapted_shared_parameters
from .stage_building import check_source, routers_of, stage_from_config, stage_from_pretrained
from .stage_cache import StageCache
from .stage_model import refuse_arguments
from .stage_plan import StagePlan, loop_ranks, plan_stages, split_layers, v_ranks
from .stage_runtime import DepthPipelineStage, refuse_split_backward, reset_shapes

_V_SCHEDULES = (ScheduleZBVZeroBubble, ScheduleDualPipeV)
_SPLIT_BACKWARD = (*_V_SCHEDULES, ScheduleInterleavedZeroBubble)

# Labels of this value have no loss.
_IGNORED = -100


class DepthPipeline:
    """The stages of one rank and their schedule.

    Args:
        schedule: a schedule of `torch.distributed.pipelining`, made for `stages`.
        stages: the stages of this rank.
        group: process group of the pipeline.

    Attributes:
        models: the models of the stages, maybe wrapped.
    """

    def __init__(self, schedule: Any, stages: Sequence[DepthPipelineStage], group: dist.ProcessGroup | None = None):
        self.schedule = schedule
        self.stages = list(stages)
        self.group = group
        self.models: list[nn.Module] = [stage.submod for stage in self.stages]
        self.has_first_stage = any(stage.is_first for stage in self.stages)
        self.has_last_stage = any(stage.is_last for stage in self.stages)
        self._shapes: object = None
        self._trained: tuple[bool, ...] = ()

    def step(
        self, input_ids: Tensor, labels: Tensor, *, num_items_in_batch: int | None = None, **kwargs
    ) -> Tensor | None:
        """Run forward and backward of one batch, and add to the gradients of all parameters.

        All ranks of the pipeline call it with the same arguments. Gradients of shared parameters are summed over the
        stages, also if gradients of several steps accumulate.

        Args:
            input_ids: `[B, T]`; B is a multiple of the number of microbatches.
            labels: `[B, T]`, as in transformers; -100 has no loss.
            num_items_in_batch: number of labels by which the sum of losses is divided; those of this batch by default.
                FSDP2 and DDP average gradients: with them, the number in the batches of all data-parallel processes
                divided by the number of these processes.
            **kwargs: further arguments of the model (`attention_mask`, `position_ids`), tensors with B rows.

        Returns:
            The loss on the rank of the last stage, a scalar; `None` on other ranks.

        Raises:
            ValueError: before any stage runs, for tensors that do not split into microbatches, and for arguments that
                are not possible in stages.
            RuntimeError: if parameters were frozen or unfrozen since the last step without `reset_shapes`.
        """
        shared = shared_parameters(self.stages)
        earlier = [parameter.grad for parameter in shared]
        for parameter in shared:
            parameter.grad = None
        try:
            loss = self._run(self.schedule.step, input_ids, labels, num_items_in_batch, kwargs)
            sum_shared_gradients(self.stages, self.group)
        finally:
            for parameter, gradient in zip(shared, earlier, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return loss

    def evaluate(
        self, input_ids: Tensor, labels: Tensor, *, num_items_in_batch: int | None = None, **kwargs
    ) -> Tensor | None:
        """Return the loss of one batch without gradients, with the models in evaluation mode; arguments of `step`."""
        with eval_mode(*self.models), torch.no_grad():
            return self._run(self.schedule.eval, input_ids, labels, num_items_in_batch, kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all stages of this rank."""
        for model in self.models:
            yield from model.parameters()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients of the whole model to a norm of at most `max_norm`; return the norm before.

        Args:
            max_norm: the largest allowed Euclidean norm.
        """
        return clip_grad_norm(self.stages, max_norm, self.group)

    def reset_shapes(self) -> None:
        """Let the next step infer shapes again; call it on all ranks after freezing or unfreezing parameters.

        Other lengths, batch sizes, keyword arguments and autocast settings are noticed.
        """
        reset_shapes(self.schedule, self.stages)
        self._shapes = None

    def _run(
        self, run: Callable, input_ids: Tensor, labels: Tensor, num_items: int | None, kwargs: dict
    ) -> Tensor | None:
        self._check(input_ids, labels, kwargs)
        if num_items is None:
            # As in transformers, the label at position t + 1 belongs to the logits at t.
            targets = kwargs.get("shift_labels", labels[:, 1:])
            num_items = int((targets != _IGNORED).sum())
        self._notice_shapes(input_ids, kwargs)
        losses: list[Tensor] = []
        try:
            run(
                *((input_ids,) if self.has_first_stage else ()),
                target=labels if self.has_last_stage else None,
                losses=losses if self.has_last_stage else None,
                return_outputs=False,
                labels=labels,
                num_items_in_batch=int(num_items),
                **kwargs,
            )
        except BaseException:
            # The inference of shapes may have been interrupted.
            self._shapes = None
            raise
        finally:
            for stage in self.stages:
                stage.clear_runtime_states()
        return torch.stack([loss.detach() for loss in losses]).sum() if losses else None

    def _check(self, input_ids: Tensor, labels: Tensor, kwargs: dict) -> None:
        """Refuse what a stage would refuse, on all ranks: a single one would leave the others waiting."""
        num_rows, num_microbatches = input_ids.shape[0], self.schedule._n_microbatches
        if num_rows % num_microbatches:
            raise ValueError(f"input_ids: {num_rows} rows must be a multiple of num_microbatches {num_microbatches}.")
        for name, value in {"labels": labels, **kwargs}.items():
            if isinstance(value, Tensor) and value.shape[:1] != (num_rows,):
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}; it must have {num_rows} rows, those of input_ids, since "
                    "it is split into microbatches."
                )
        refuse_arguments(cast(DepthAttnConfig, model_of(self.stages[0]).config), kwargs)

    def _notice_shapes(self, input_ids: Tensor, kwargs: dict) -> None:
        device_type = torch.device(self.stages[0].device).type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        arguments = {name: getattr(value, "shape", value) for name, value in kwargs.items()}
        shapes = (input_ids.shape, arguments, autocast)
        trained = tuple(parameter.requires_grad for parameter in self.parameters())
        if shapes != self._shapes:
            self.reset_shapes()
        elif trained != self._trained:
            # Other ranks do not notice it.
            raise RuntimeError(
                "requires_grad: parameters were frozen or unfrozen since the last step; call `reset_shapes()` on all "
                "ranks of the pipeline."
            )
        self._shapes, self._trained = shapes, trained


def build_pipeline(
    source: str | os.PathLike | DepthAttnConfig,
    schedule: str | type,
    *,
    num_microbatches: int,
    device: torch.device | str,
    group: dist.ProcessGroup | None = None,
    stages_per_rank: int | None = None,
    layers: Sequence[range] | None = None,
    cross_stage_cache: bool = True,
    parallelize: Callable[[PreTrainedModel], nn.Module] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    model_class: type[PreTrainedModel] = DepthAttnForCausalLM,
) -> DepthPipeline:
    """Build the stages of this rank and their schedule; all ranks of the pipeline call it with the same arguments.

    Args:
        source: a checkpoint of the whole model, of which each rank reads the tensors of its stages only, or a config:
            the stages then get initial weights (`stage_from_config`).
        schedule: a schedule of `torch.distributed.pipelining` or its name: `"GPipe"`, `"1F1B"`, `"Interleaved1F1B"`,
            `"LoopedBFS"`, `"InterleavedZeroBubble"`, `"ZBVZeroBubble"`, `"DualPipeV"`.
        num_microbatches: number of microbatches of a step.
        device: device of this rank.
        group: process group of the pipeline; the default group by default.
        stages_per_rank: number of virtual stages per rank, by default 1 for GPipe and 1F1B and 2 for others.
        layers: the decoder layers of every stage, for uneven splits.
        cross_stage_cache: whether a rank keeps what it has received or made for its later stages; otherwise every
            boundary carries the whole depth state.
        parallelize: function of the model of a stage that changes it in place (`fully_shard`, gradient checkpointing,
            `peft.inject_adapter_in_model`) or wraps it in DDP, and returns it, before the stage is made.
        seed: seed of initial weights.
        dtype: dtype of the models; that of the checkpoint or of the config by default.
        model_class: `DepthAttnForCausalLM` or a subclass.

    Raises:
        UserError: if the source is no checkpoint of a causal LM with depth attention, or is damaged.
        ValueError: if the schedule is not possible with the number of stages per rank, the split of layers or the
            wrapper of the models, without microbatches, or for other wrappers than DDP.
    """
    schedule_class = get_schedule_class(schedule) if isinstance(schedule, str) else schedule
    config = source if isinstance(source, DepthAttnConfig) else check_source(source, model_class)
    num_ranks = dist.get_world_size(group)
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches: {num_microbatches} must be at least 1.")
    if layers is None:
        num_stages = num_ranks * (stages_per_rank or _stages_per_rank(schedule_class))
        layers = split_layers(config.host_config.num_hidden_layers, num_stages)
    elif stages_per_rank not in (None, len(layers) / num_ranks):
        raise ValueError(
            f"stages_per_rank: {stages_per_rank} with {len(layers)} stages in layers and {num_ranks} ranks; give only "
            "one of them."
        )
    ranks = _ranks(schedule_class, num_ranks, len(layers))
    plans = plan_stages(
        config, layers, ranks, cross_stage_cache=cross_stage_cache, routers=routers_of(config, model_class)
    )
    device, cache = torch.device(device), StageCache()

    def stage_of(plan: StagePlan) -> DepthPipelineStage:
        if isinstance(source, DepthAttnConfig):
            model = stage_from_config(source, plan, seed=seed, dtype=dtype, device=device, model_class=model_class)
        else:
            options = {} if dtype is None else {"dtype": dtype}
            model = stage_from_pretrained(source, plan, model_class=model_class, **options).train()
            cast(nn.Module, model).to(device)
        module = model if parallelize is None else parallelize(model)
        if issubclass(schedule_class, _SPLIT_BACKWARD):
            refuse_split_backward(module)
        stage = DepthPipelineStage(module, plan, device, cache, group)
        if not isinstance(model_of(stage), PreTrainedModel):
            raise ValueError(
                f"parallelize: it returned a {type(model_of(stage)).__name__}; it must return the model itself, "
                "changed in place (`fully_shard(model)`, `model.compile()`, `peft.inject_adapter_in_model`), or "
                "DistributedDataParallel of it."
            )
        if adapted := adapted_shared_parameters(model_of(stage)):
            raise ValueError(
                f"parallelize: it adds an adapter to {few(adapted)}, which several stages have; their adapters would "
                "differ. Exclude its module (`exclude_modules`)."
            )
        return stage

    stages = [stage_of(plan) for plan in plans if plan.rank == dist.get_rank(group)]
    made = schedule_class(
        stages[0] if issubclass(schedule_class, PipelineScheduleSingle) else stages,
        num_microbatches,
        # The last stage returns the loss of a microbatch as its share of the batch.
        loss_fn=_output,
        scale_grads=False,
    )
    placed = [stages[0].stage_index_to_group_rank[stage] for stage in range(len(layers))]
    assert placed == ranks, f"the schedule places stages on {placed}, the plan on {ranks}"
    return DepthPipeline(made, stages, group)


def _output(output: Tensor, target: Tensor) -> Tensor:
    return output


def _stages_per_rank(schedule_class: type) -> int:
    return 1 if issubclass(schedule_class, PipelineScheduleSingle) else 2


def _ranks(schedule_class: type, num_ranks: int, num_stages: int) -> list[int]:
    """Return the rank of every stage, as the schedule will place it."""
    per_rank, rest = divmod(num_stages, num_ranks)
    name = schedule_class.__name__
    if rest or per_rank == 0:
        raise ValueError(f"layers: {num_stages} stages must be a multiple of the {num_ranks} ranks of the pipeline.")
    if issubclass(schedule_class, PipelineScheduleSingle) and per_rank != 1:
        raise ValueError(f"stages_per_rank: {per_rank} is not possible with {name}, only 1.")
    if not issubclass(schedule_class, _V_SCHEDULES):
        return loop_ranks(num_ranks, per_rank)
    if per_rank != 2:
        raise ValueError(f"stages_per_rank: {per_rank} is not possible with {name}, only 2.")
    return v_ranks(num_ranks)
