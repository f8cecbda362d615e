"""Sinkhorn normalisation of many small matrices: rows and columns divided by their sums in turn (Sinkhorn-Knopp).

With rows `r` and columns `c` of a positive matrix M, one iteration is

    M_rc <- M_rc / sum_c M_rc,   M_rc <- M_rc / sum_r M_rc

The tokens are the last dimension, so that sums over a few rows or columns are sums of long vectors: 3 to 5 times as
fast on a CPU as matrices in the last two. `sinkhorn_reference` defines the result. `sinkhorn` computes the same in
place and keeps only the sums for the backward pass, which undoes one division after the other.
"""

from typing import Any

import torch
from torch import Tensor

from .op_dispatch import needs_reference

# Entries below this are raised to it, so that no row or column sums to zero.
_SMALLEST_ENTRY = 1e-30


def sinkhorn(logits: Tensor, num_iters: int) -> Tensor:
    """Return `exp(logits)` after `num_iters` iterations, each of the rows and then of the columns.

    Sums over rows (of a column) are 1 up to rounding, sums over columns approximately.

    Args:
        logits: `[n, n, tokens]`, rows first.
        num_iters: number of iterations, at least 1.
    """
    if needs_reference():
        return sinkhorn_reference(logits, num_iters)
    matrices: Tensor = _Divisions.apply(_first_rows(logits), num_iters)
    return matrices


def sinkhorn_reference(logits: Tensor, num_iters: int) -> Tensor:
    """Compute `sinkhorn` by its equation, with autograd; arguments as there."""
    return _divided_reference(_first_rows(logits), num_iters)


def _first_rows(logits: Tensor) -> Tensor:
    # The softmax is the first division of the rows, and cannot overflow.
    return logits.softmax(1).clamp_min(_SMALLEST_ENTRY)


def _divided_reference(matrices: Tensor, num_iters: int) -> Tensor:
    for step in range(2 * num_iters - 1):
        matrices = matrices / matrices.sum(step % 2, keepdim=True)
    return matrices


class _Divisions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrices: Tensor, num_iters: int) -> Tensor:
        divided, sums = matrices.clone(), []
        for step in range(2 * num_iters - 1):
            sums.append(divided.sum(step % 2, keepdim=True))
            divided.div_(sums[-1])
        ctx.save_for_backward(matrices, divided, *sums)
        ctx.num_iters = num_iters
        return divided

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        matrices, divided, *sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            # `create_graph=True`: the gradient must itself have a graph.
            expected = _divided_reference(matrices, ctx.num_iters)
            return torch.autograd.grad(expected, matrices, grad, create_graph=True)[0], None
        # M' = M / s has the gradient (dL/dM' - sum(dL/dM' * M')) / s, and M = M' s.
        # Contiguous, because a gradient may come with the tokens first in memory.
        grad, divided = grad.clone(memory_format=torch.contiguous_format), divided.clone()
        for step in reversed(range(len(sums))):
            grad.sub_((grad * divided).sum(step % 2, keepdim=True)).div_(sums[step])
            divided.mul_(sums[step])
        return grad, None
