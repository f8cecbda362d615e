"""Parameters that several stages have: the weights of all AttnRes reads, and tied embeddings.

Every stage has the stacked weights of all reads (`depth_reads`) and uses its rows; the first and the last stage have
the weight of tied embeddings. The copies start equal. They stay equal, with any optimizer, since after every step each
has the sum of all their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .stage_runtime import DepthPipelineStage

Parameters = list[nn.Parameter]


def model_of(stage: DepthPipelineStage) -> PreTrainedModel:
    """Return the model of a stage, without DDP.

    Args:
        stage: the stage.
    """
    wrapped = isinstance(stage.submod, DistributedDataParallel)
    return cast(PreTrainedModel, stage.submod.module if wrapped else stage.submod)


def shared_parameters(stages: Sequence[DepthPipelineStage]) -> Parameters:
    """Return the parameters of the stages that other stages have too, frozen ones left out.

    Args:
        stages: the stages of this rank.
    """
    return [parameter for stage in stages for parameter in (*_of_all_stages(stage), *_of_both_ends(stage))]


def sum_shared_gradients(stages: Sequence[DepthPipelineStage], group: dist.ProcessGroup | None = None) -> None:
    """Give every copy of a shared parameter the sum of the gradients of all copies.

    Call it once between the last backward and the optimizer's step; `DepthPipeline.step` does so.

    Args:
        stages: the stages of this rank.
        group: process group of the pipeline.
    """
    for copies in zip(*(_of_all_stages(stage) for stage in stages), strict=True):
        total = _sum(copies)
        # Some shards of FSDP2 are empty.
        if total.numel() > 0:
            dist.all_reduce(total, group=group)
        _set(copies, total)
    first = [stage for stage in stages if stage.is_first]
    last = [stage for stage in stages if stage.is_last]
    if not first and not last:
        return
    for copies in zip(*(_of_both_ends(stage) for stage in (*first, *last)), strict=True):
        total = _sum(copies)
        if not (first and last) and total.numel() > 0:
            end = (first or last)[0]
            peer = end.stage_index_to_group_rank[end.num_stages - 1 if first else 0]
            other = _exchange(total, peer, group)
            # In the same order in both.
            total = total + other if first else other + total
        _set(copies, total)


def clip_grad_norm(
    stages: Sequence[DepthPipelineStage], max_norm: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale the gradients of all stages so that their Euclidean norm is at most `max_norm`.

    Shared parameters count once. Call it on all ranks, after `sum_shared_gradients`.

    Args:
        stages: the stages of this rank.
        max_norm: the largest allowed norm.
        group: process group of the pipeline.

    Returns:
        The norm before, of the gradients of the whole model, in float64.
    """
    counted: list[Tensor] = []
    for stage in stages:
        elsewhere = set() if stage.is_first else {id(parameter) for parameter in shared_parameters([stage])}
        counted += [
            parameter.grad
            for parameter in stage.submod.parameters()
            if parameter.grad is not None and id(parameter) not in elsewhere
        ]
    norm = torch.nn.utils.get_total_norm(counted)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(stages[0].device)
    # In one dtype on all ranks, so that all copies of a shared parameter are scaled alike.
    square = norm.double().square()
    dist.all_reduce(square, group=group)
    norm = square.sqrt()
    for stage in stages:
        torch.nn.utils.clip_grads_with_norm_(stage.submod.parameters(), max_norm, norm)
    return norm


def _of_all_stages(stage: DepthPipelineStage) -> Parameters:
    return _named(stage, "parameters_of_all_stages")


def _of_both_ends(stage: DepthPipelineStage) -> Parameters:
    return _named(stage, "parameters_of_both_ends") if stage.is_first or stage.is_last else []


def _named(stage: DepthPipelineStage, attribute: str) -> Parameters:
    model = model_of(stage)
    names = cast(tuple[str, ...], getattr(model, attribute))
    parameters = (model.get_parameter(name) for name in names)
    return [parameter for parameter in parameters if parameter.requires_grad]


def _sum(copies: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of the local parts of the gradients, zeros for those without; a new tensor."""
    total = torch.zeros_like(_local(copies[0].detach()))
    for copy in copies:
        if copy.grad is not None:
            total += _local(copy.grad)
    return total


def _set(copies: Sequence[nn.Parameter], total: Tensor) -> None:
    for copy in copies:
        if copy.grad is None:
            copy.grad = torch.zeros_like(copy)
        _local(copy.grad).copy_(total)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _exchange(tensor: Tensor, peer: int, group: dist.ProcessGroup | None) -> Tensor:
    """Send a tensor to a rank of the group and return the one that it sends."""
    received = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, received, group=group, group_peer=peer),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received
