"""The stage that the schedules of `torch.distributed.pipelining` run, with cross-stage caching."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_weight
from torch.nn.parallel import DistributedDataParallel

from ..attn_res_reads import DEPTH_READS
from .stage_cache import StageCache
from .stage_plan import StagePlan

# Methods of torch's stage that this file overrides or relies on.
_STAGE_METHODS = (
    "_compute_input_grads",
    "_compute_outputs",
    "_forward_metadata_inference",
    "_post_metadata_inference_cleanup",
    "_retrieve_recv_activations",
    "_retrieve_recv_grads",
    "_setup_backward_recv_info",
    "_setup_forward_recv_info",
    "_validate_stage_tensors",
    "backward_maybe_with_nosync",
)


def check_stage_interface(stage_class: type) -> None:
    """Check that torch's pipeline stage has the methods that ours overrides; older versions have others.

    Args:
        stage_class: `torch.distributed.pipelining.PipelineStage`.

    Raises:
        ImportError: if it lacks one.
    """
    missing = [name for name in _STAGE_METHODS if not hasattr(stage_class, name)]
    if missing:
        raise ImportError(
            f"hf_depthattn.distributed: the PipelineStage of torch {torch.__version__} has no {', '.join(missing)}; "
            "pipeline stages need a later version (they are tested with torch 2.13)."
        )


check_stage_interface(PipelineStage)


class DepthPipelineStage(PipelineStage):
    """A pipeline stage that takes a part of its input from the cache of its rank.

    The schedule sends and receives `plan.received`, `plan.gives` and their gradients, as for any stage; the module
    gets `plan.takes`. Receive buffers exist from the posting of the receive to the use of the tensor, so that their
    number does not grow with that of microbatches. Shapes and dtypes are inferred in the first step (`reset_shapes`).

    Args:
        submodule: the model of the stage (`stage_model`), maybe wrapped.
        plan: the plan of the stage.
        device: the device of the stage.
        cache: the cache of the rank, common to its stages.
        group: process group of the pipeline; the default group by default.
    """

    def __init__(
        self,
        submodule: nn.Module,
        plan: StagePlan,
        device: torch.device,
        cache: StageCache,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__(submodule, plan.index, plan.num_stages, device, group=group)
        self.plan = plan
        self.cache = cache
        self._input_gradients: tuple[Tensor | None, ...] = ()
        # Microbatch -> results of `depth_reads`, of which the module got leaves.
        self._read_weights: dict[int, list[Tensor]] = {}
        # Owned items that the stage has made itself: the gradients of later stages join those of its output.
        self._made = frozenset(plan.owned) - frozenset(plan.received)

    # --- inference of shapes, by a forward on tensors of the shapes that the stage before announces ---

    def _forward_metadata_inference(self, *args, **kwargs):
        result = super()._forward_metadata_inference(*args, **kwargs)
        if not self.is_last:
            self.cache.metas.update(zip(self.plan.gives, cast(tuple, self._stage_meta.outputs), strict=True))
        return result

    def _compute_outputs(self, *args, module, **kwargs):
        metas = self.cache.metas
        if not self.is_first:
            metas.update(zip(self.plan.received, cast(tuple, self._stage_meta.inputs), strict=True))
        cached = (metas[item].to_tensor(self.device) for item in self.plan.cached)
        with self._without_reduction():
            return super()._compute_outputs(*args, *cached, module=module, **kwargs)

    def _compute_input_grads(self, *args, **kwargs):
        # The stage before allocates its buffers by the strides of these.
        return tuple(_contiguous(gradient) for gradient in super()._compute_input_grads(*args, **kwargs))

    def _validate_stage_tensors(self, desc, expected, actual):
        # Of the input, torch knows what is received.
        super()._validate_stage_tensors(desc, expected, actual if expected is None else actual[: len(expected)])

    def _post_metadata_inference_cleanup(self):
        # Torch drops the gradients of FSDP2, to which the inference adds none, with those of earlier steps.
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        gradients = [(parameter, parameter.grad) for parameter in self.submod.parameters()]
        super()._post_metadata_inference_cleanup()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    # --- receive buffers, which torch allocates for all microbatches at once and keeps ---

    def _setup_forward_recv_info(self, *args):
        with self._on_meta_device():
            super()._setup_forward_recv_info(*args)
        for infos in self.args_recv_info.values():
            _drop_buffers(infos)

    def _setup_backward_recv_info(self, *args):
        with self._on_meta_device():
            super()._setup_backward_recv_info(*args)
        for infos in self.grad_recv_info.values():
            _drop_buffers(infos)

    @contextlib.contextmanager
    def _on_meta_device(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _allocate_buffers(self, infos: Iterable[Any], make=torch.empty_strided) -> None:
        for info in infos:
            meta = info.tensor_meta
            if not info.is_root_arg and info.buffer is None and meta is not None:
                info.buffer = make(meta.shape, meta.stride, dtype=meta.dtype, device=self.device)

    def get_fwd_recv_ops(self, fwd_chunk_id):
        self._allocate_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id):
        if self.has_backward and not self.is_last:
            self._allocate_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    # --- forward ---

    def _retrieve_recv_activations(self, fwd_chunk_id):
        received = super()._retrieve_recv_activations(fwd_chunk_id)
        _drop_buffers(self.args_recv_info[fwd_chunk_id])
        self._keep(fwd_chunk_id, self.plan.received, received)
        needs_grad = self.has_backward and torch.is_grad_enabled()
        return (*received, *self.cache.leaves(fwd_chunk_id, self.plan.cached, needs_grad))

    def forward_one_chunk(self, fwd_chunk_id, args, kwargs=None, save_forward_output=True):
        kwargs = {**(kwargs or {}), **self._read_leaves(fwd_chunk_id)}
        with self._without_reduction():
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if not self.is_last:
            self._keep(fwd_chunk_id, self.plan.gives, output)
        self.cache.drop(fwd_chunk_id, self.plan.last_read)
        if not self.has_backward:
            outputs, _ = self.fwd_cache.pop(fwd_chunk_id)
            if self._sends_outputs:
                self.fwd_cache[fwd_chunk_id] = (outputs, [])
        return output

    @property
    def _sends_outputs(self) -> bool:
        # The schedule may have placed the next stage on this rank.
        return not self.is_last and self.stage_index_to_group_rank[self.stage_index + 1] != self.group_rank

    def get_fwd_send_ops(self, fwd_chunk_id):
        if self.has_backward:
            return super().get_fwd_send_ops(fwd_chunk_id)
        # Torch keeps the outputs for the backward.
        operations = super().get_fwd_send_ops(fwd_chunk_id) if self._sends_outputs else []
        self.fwd_cache.pop(fwd_chunk_id, None)
        return operations

    def _without_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for forwards of DDP: otherwise each lets the next backward reduce gradients.

        Torch asks for the reduction before the last backward of a step.
        """
        module: nn.Module = self.submod
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def _keep(self, microbatch: int, items: Iterable, tensors: Iterable[Tensor]) -> None:
        pairs = zip(items, tensors, strict=True)
        self.cache.keep(
            microbatch, (pair for pair in pairs if pair[0] in self.plan.kept and pair[0] in self.plan.owned)
        )

    def _read_leaves(self, microbatch: int) -> dict[str, tuple[Tensor, ...]]:
        """Return the weights of the stage's reads as a further input of its module.

        A zero-bubble schedule computes gradients of inputs first. Those of parameters follow per parameter, from where
        it meets the path of the inputs, which for the stacked weights of all reads is everywhere in the stage: torch
        would run its whole backward again, through parts of the graph that it has freed.
        """
        reads = getattr(self.submod.base_model, DEPTH_READS, None) if wrapper_of(self.submod) is None else None
        is_training = self.has_backward and torch.is_grad_enabled()
        # Torch runs the backward of the first stage as a whole.
        if reads is None or self.is_first or not is_training:
            return {}
        weights = [weight for weight in reads() if weight is not None]
        self._read_weights[microbatch] = weights
        return {"read_leaves": tuple(weight.detach().requires_grad_(weight.requires_grad) for weight in weights)}

    def _backward_of_reads(self, microbatch: int) -> None:
        weights = self._read_weights.pop(microbatch, [])
        # Keyword arguments are the last inputs of the module, and these the last of them.
        gradients = self._input_gradients[len(self._input_gradients) - len(weights) :]
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.backward(gradient)

    # --- backward ---

    def _retrieve_recv_grads(self, bwd_chunk_id):
        infos = self.grad_recv_info[bwd_chunk_id]
        # The next stage, if it is on this rank, leaves no tensor where it has no gradient.
        self._allocate_buffers(infos, _zeros_strided)
        gradients = super()._retrieve_recv_grads(bwd_chunk_id)
        _drop_buffers(infos)
        return tuple(
            self.cache.withdraw(bwd_chunk_id, item, gradient) if item in self._made else gradient
            for item, gradient in zip(self.plan.gives, gradients, strict=True)
        )

    def backward_maybe_with_nosync(self, backward_type, bwd_kwargs, last_backward=False):
        if backward_type != "full":
            refuse_split_backward(self.submod)
        if backward_type == "weight":
            # A parameter that is used twice in a stage (MoDA applies the host's key norm to slots of the MLP too) has
            # its gradient through a part of the graph that others need as well.
            groups = bwd_kwargs["param_groups"]
            return stage_backward_weight(self.submod.parameters(), groups, retain_graph=True), None
        inputs = bwd_kwargs["input_values"][: len(self.plan.takes)]
        if backward_type == "input" and not all(value.requires_grad for value in inputs):
            # Torch finds parameters on the path of the inputs' gradients; without some of these (parameters of earlier
            # stages are frozen) it misses others silently. All are computed at once, and nothing is left for later.
            backward_type = "full"
            if self.is_last:
                (loss,) = bwd_kwargs["stage_output"]
                bwd_kwargs = {**bwd_kwargs, "stage_output": loss}
        gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self._input_gradients = gradients
        return gradients, [] if groups is None else groups

    def backward_one_chunk(self, bwd_chunk_id, *args, **kwargs):
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            return
        if self.is_first:
            # Nobody fetches the gradients of `input_ids`, which are none.
            del self.bwd_cache[bwd_chunk_id]
        else:
            self._backward_of_reads(bwd_chunk_id)
            num_received, num_taken = len(self.plan.received), len(self.plan.takes)
            of_cached = self._input_gradients[num_received:num_taken]
            self._input_gradients = ()
            self.cache.deposit(bwd_chunk_id, zip(self.plan.cached, of_cached, strict=True))
            self.bwd_cache[bwd_chunk_id] = tuple(
                _contiguous(self.cache.withdraw(bwd_chunk_id, item, gradient) if item in self.plan.owned else gradient)
                for item, gradient in zip(self.plan.received, self.bwd_cache[bwd_chunk_id], strict=True)
            )
        if self.plan.first_on_rank:
            left = {*self.cache.tensors.get(bwd_chunk_id, ()), *self.cache.gradients.get(bwd_chunk_id, ())}
            assert not left, f"microbatch {bwd_chunk_id} leaves {left} in the cache"

    # Torch does not expect an evaluation with two stages in succession on one rank (ZBV, DualPipeV).

    def get_local_bwd_output(self, mb_index):
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def clear_runtime_states(self):
        super().clear_runtime_states()
        self.cache.clear()
        self._read_weights.clear()


def wrapper_of(module: nn.Module) -> str | None:
    """Return the name of what distributes the model of a stage over further processes, if anything does.

    Args:
        module: the model of a stage.
    """
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    return "FSDP2 (fully_shard)" if any(isinstance(child, FSDPModule) for child in module.modules()) else None


def refuse_split_backward(module: nn.Module) -> None:
    """Refuse the zero-bubble schedules for sharded and replicated stages.

    They run the backward for inputs and for weights apart, and torch then reduces only a part of the gradients over
    the processes, also with a plain residual stream.

    Args:
        module: the model of a stage.

    Raises:
        ValueError: if it is wrapped by FSDP2 or DDP.
    """
    wrapper = wrapper_of(module)
    if wrapper is not None:
        raise ValueError(
            "schedule: zero-bubble schedules (InterleavedZeroBubble, ZBVZeroBubble, DualPipeV) are not possible with "
            f"{wrapper}: torch loses gradients silently; use GPipe, 1F1B, Interleaved1F1B or LoopedBFS."
        )


def reset_shapes(schedule: Any, stages: Iterable[DepthPipelineStage]) -> None:
    """Let the next step infer shapes and dtypes again, on all ranks: for another sequence length, dtype or freezing.

    Args:
        schedule: the schedule.
        stages: its stages on this rank.
    """
    for kind in ("_stage", "_stages"):
        for way in ("forward", "backward"):
            if hasattr(schedule, f"{kind}_{way}_initialized"):
                setattr(schedule, f"{kind}_{way}_initialized", False)
    for stage in stages:
        stage._inference_mode = None
        stage.cache.metas.clear()


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


def _zeros_strided(shape: torch.Size, stride: tuple[int, ...], **options) -> Tensor:
    return torch.empty_strided(shape, stride, **options).zero_()


def _drop_buffers(infos: Iterable[Any]) -> None:
    for info in infos:
        if not info.is_root_arg:
            info.buffer = None
