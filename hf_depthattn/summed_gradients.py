"""Tensors that every process has whole, while each computes only a part of their gradient.

The sum over the processes is an operation of the graph, so that what a backward pass adds to `.grad` is the whole
gradient of that pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumGradients(torch.autograd.Function):
    """The identity, whose backward sums the gradients over a process group, with one message per dtype."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Unused tensors have no gradient, in any process.
        found = [grad for grad in grads if grad is not None]
        summed: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(grad.dtype for grad in found):
            of_dtype = [grad for grad in found if grad.dtype == dtype]
            message = torch.cat([grad.flatten() for grad in of_dtype])
            dist.all_reduce(message, group=ctx.group)
            parts = message.split([grad.numel() for grad in of_dtype])
            summed |= {id(grad): part.view_as(grad) for grad, part in zip(of_dtype, parts, strict=True)}
        return None, *(None if grad is None else summed[id(grad)] for grad in grads)


def with_summed_gradients(tensors: Sequence[Tensor], group: Any) -> tuple[Tensor, ...]:
    """Return the tensors; their gradients will be summed over a process group.

    Args:
        tensors: the tensors, equal in all processes.
        group: the process group.
    """
    return _SumGradients.apply(group, *tensors)


@contextmanager
def sums_gradients(modules: Iterable[nn.Module], group: Any) -> Iterator[None]:
    """Sum the gradients of parameters over a process group, as far as they are used inside the context.

    Args:
        modules: the modules whose parameters these are, including their submodules.
        group: the process group.

    Raises:
        RuntimeError: if a parameter is sharded, as by FSDP2 before the forward of its own module.
    """
    if not torch.is_grad_enabled():
        yield
        return
    owners = [
        (owner, name, parameter)
        for module in modules
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for owner, name, parameter in owners:
        if hasattr(parameter, "full_tensor"):
            raise RuntimeError(
                f"{type(owner).__name__}.{name}: every process must have the whole parameter, and it is sharded. Use "
                "`fully_shard` on whole decoder layers, not on modules within them."
            )
    if owners:
        replaced = with_summed_gradients([parameter for *_, parameter in owners], group)
        for (owner, name, _), tensor in zip(owners, replaced, strict=True):
            owner._parameters[name] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner, name, parameter in owners:
            owner._parameters[name] = parameter
