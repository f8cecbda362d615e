"""The backward of AttnRes reads by "pull" on a GPU, see `attn_res_pull_ops` of `hf_depthattn`.

That file contains the torch implementations of the three steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attn_res_inputs import ReadGradientInputs
from .attn_res_ops import read_backward
from .attn_res_pull import attn_res_pull_kernel
from .launches import aligned, device_table, on_device, sum_dtype

# A program processes rows of 512 bytes in bfloat16, with 16 elements per thread.
BLOCK_T, BLOCK_D, NUM_WARPS = 8, 256, 4


class PullImpl(NamedTuple):
    """An implementation of the three steps.

    Attributes:
        read: `(sources, score_weight, eps, read_scale) -> (h, statistics)`.
        coefficients: `(grad_h, sources, score_weight, statistics, read_scale) -> ([3, N, tokens], [D])`, which are
            a, b and c, and the gradient of the score weight.
        pull: `(source, direct | None, grads, score_weights, coefficients, positions) -> [..., D]`, the gradient of a
            source.
    """

    read: Callable
    coefficients: Callable
    pull: Callable


def read_triton(
    sources: Sequence[Tensor], score_weight: Tensor, eps: float, read_scale: float
) -> tuple[Tensor, Tensor]:
    """Return h [..., D], and the statistics that `coefficients_triton` needs."""
    weight = score_weight.to(sum_dtype(sources[0]))
    return torch.ops.depthattn.attn_res_plain_read_triton(list(sources), weight, eps, read_scale)


def coefficients_triton(
    grad_h: Tensor, sources: Sequence[Tensor], score_weight: Tensor, stats: Tensor, read_scale: float
) -> tuple[Tensor, Tensor]:
    """Return a, b and c of `attn_res_pull`, [3, N, tokens], and the gradient of the score weight [D]."""
    weight = score_weight.to(sum_dtype(sources[0]))
    return torch.ops.depthattn.attn_res_plain_coefficients_triton(grad_h, list(sources), weight, stats, read_scale)


def pull_triton(
    source: Tensor,
    direct: Tensor | None,
    grads: Sequence[Tensor],
    score_weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    positions: Sequence[int],
) -> Tensor:
    """Return the gradient of a source [..., D] from its reads; `positions` are its indices in their sources."""
    weights = [weight.to(sum_dtype(source)) for weight in score_weights]
    return torch.ops.depthattn.attn_res_pull_triton(
        source, direct, list(grads), weights, list(coefficients), list(positions)
    )


def _coefficients(
    grad_h: Tensor, sources: list[Tensor], score_weight: Tensor, stats: Tensor, read_scale: float
) -> tuple[Tensor, Tensor]:
    coefficients = stats.new_empty(3, len(sources), stats.shape[0])
    no_grads = [False] * len(sources)
    inputs = ReadGradientInputs(grad_h, sources, score_weight, stats, read_scale, no_grads)
    _, grad_weight = read_backward(inputs, coefficients)
    return coefficients, grad_weight


def _pull(
    source: Tensor,
    direct: Tensor | None,
    grads: list[Tensor],
    score_weights: list[Tensor],
    coefficients: list[Tensor],
    positions: list[int],
) -> Tensor:
    num_channels = source.shape[-1]
    num_tokens = source.numel() // num_channels
    source = source.contiguous()
    out = torch.empty_like(source)
    if num_tokens == 0:
        return out
    # References are kept until the launch, since the table contains only addresses.
    grads = [aligned(grad) for grad in grads]
    score_weights = [aligned(weight) for weight in score_weights]
    numbers = []
    for grad, weight, numbers_of_read, i in zip(grads, score_weights, coefficients, positions, strict=True):
        numbers += [grad.data_ptr(), numbers_of_read[0, i].data_ptr(), weight.data_ptr(), numbers_of_read.stride(0)]
    grid = (-(-num_tokens // BLOCK_T), -(-num_channels // BLOCK_D))
    with on_device(source):
        attn_res_pull_kernel[grid](
            device_table(source.device, numbers),
            source,
            None if direct is None else direct.contiguous(),
            score_weights[0],
            out,
            num_tokens,
            len(grads),
            D=num_channels,
            BLOCK_T=BLOCK_T,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
            # From Triton 3.10 on, multiplications and additions are not fused by default.
            enable_fp_fusion=True,
        )
    return out


def _register_coefficients() -> None:
    coefficients = torch.library.custom_op(
        "depthattn::attn_res_plain_coefficients_triton",
        _coefficients,
        mutates_args=(),
        schema="(Tensor grad_h, Tensor[] sources, Tensor score_weight, Tensor stats, float read_scale) "
        "-> (Tensor, Tensor)",
    )
    coefficients.register_fake(
        lambda grad_h, sources, score_weight, stats, read_scale: (
            stats.new_empty(3, len(sources), stats.shape[0]),
            score_weight.new_empty(score_weight.shape),
        )
    )


def _register_pull() -> None:
    pull = torch.library.custom_op(
        "depthattn::attn_res_pull_triton",
        _pull,
        mutates_args=(),
        schema="(Tensor source, Tensor? direct, Tensor[] grads, Tensor[] score_weights, Tensor[] coefficients, "
        "int[] positions) -> Tensor",
    )
    pull.register_fake(lambda source, *_: source.new_empty(source.shape))


# A second copy of this file (remote code) must use the ops of the first. A copy saved by an older version shares the
# pull, but its `attn_res_coefficients_triton` expects other statistics.
if not hasattr(torch.ops.depthattn, "attn_res_plain_coefficients_triton"):
    _register_coefficients()
if not hasattr(torch.ops.depthattn, "attn_res_pull_triton"):
    _register_pull()

PULL_TRITON = PullImpl(read_triton, coefficients_triton, pull_triton)
