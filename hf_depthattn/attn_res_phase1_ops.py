r"""Grouped AttnRes reads, phase 1: read the finished sources for all reads of a group in one pass.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. The reads of a group have the sources v_1 ... v_N in common that
are finished when the group opens. With w_s the query of read s times its key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  x_si = r_i (w_s . v_i)
    lse_s = log sum_i exp(x_si),        o_s = sum_i exp(x_si - lse_s) v_i

Phase 2 (`attn_res_phase2_ops`) adds the newer sources to each read.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_ops import SOURCE_DTYPES
from .attn_res_phase1_torch import PHASE1_TORCH
from .first_derivative import first_derivatives
from .kernels.attn_res_group_inputs import Phase1GradientInputs, Phase1Impl, Phase1Inputs
from .kernels.attn_res_phase1_ops import PHASE1_TRITON, attn_res_phase1_limit, attn_res_phase1_triton
from .op_dispatch import Op, needs_reference, register, resolve


def attn_res_phase1(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float, impl: str = "auto"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Attend to the finished sources for all reads of a group (arXiv 2603.15031, Algorithm 1, phase 1).

    Args:
        sources: N >= 1 tensors [..., D] of the same shape, dtype and device.
        score_weights: the queries of S reads times their key-norm weights, [S, D].
        eps: epsilon of the key norm, added to the mean square of a source.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        S outputs o [..., D] in the dtype of the sources, S log-sum-exps [tokens] in float32 (float64 for float64), and
        the sources, for later uses: if the implementation returns them as results, their gradients pass through the
        backward of this op, which adds its own.

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    check_phase1(sources, score_weights)
    if needs_reference():
        outs, lses = attn_res_phase1_reference(sources, score_weights, eps=eps)
        return tuple(outs), tuple(lses), tuple(sources)
    num_reads = score_weights.shape[0]
    inputs = Phase1Inputs(sources, score_weights, eps)
    phase1 = resolve(ATTN_RES_PHASE1, impl, sources[0].device, (inputs,))
    if torch.compiler.is_compiling():
        op = attn_res_phase1_triton if phase1 is PHASE1_TRITON else _torch_op
        results = op(sources, score_weights, eps=eps)
        return tuple(results[0]), tuple(results[1]), tuple(sources)
    if not torch.is_grad_enabled():
        result = phase1.forward(inputs)
        return tuple(result.outs), result.lse.unbind(0), tuple(sources)
    results = _Phase1.apply(phase1, eps, score_weights, *sources)
    outs, lses, through = results[:num_reads], results[num_reads : 2 * num_reads], results[2 * num_reads :]
    if not through:
        return outs, lses, tuple(sources)
    # A frozen source stays frozen: as a result of the op, it would need a gradient.
    return outs, lses, tuple(t if s.requires_grad else s for t, s in zip(through, sources, strict=True))


def attn_res_phase1_reference(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute outputs and log-sum-exps of `attn_res_phase1` with autograd; arguments as there."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(dtype).reshape(-1, source.shape[-1]) for source in sources]  # N x [tokens, D]
    weights = score_weights.to(dtype)
    norms = [torch.rsqrt(value.square().mean(-1) + eps) for value in values]  # N x [tokens]
    outs, lses = [], []
    for weight in weights.unbind(0):
        # Products and sums instead of a matrix product, which autocast would run in low precision.
        logits = torch.stack([(value * weight).sum(-1) * norm for value, norm in zip(values, norms, strict=True)])
        lse = logits.logsumexp(0)
        shares = (logits - lse).exp().unsqueeze(-1)  # [N, tokens, 1]
        mixed = sum(share * value for share, value in zip(shares.unbind(0), values, strict=True))
        outs.append(mixed.to(sources[0].dtype).view(sources[0].shape))
        lses.append(lse)
    return outs, lses


def check_phase1(sources: Sequence[Tensor], score_weights: Tensor) -> None:
    """Raise ValueError for invalid inputs of `attn_res_phase1`; the kernels do not check shapes."""
    if len(sources) == 0:
        raise ValueError("`sources` must contain at least one tensor, got an empty sequence")
    first = sources[0]
    shape, dtype = first.shape, first.dtype
    if dtype not in SOURCE_DTYPES:
        raise ValueError(f"`sources` must have one of the dtypes {SOURCE_DTYPES}, got {dtype}")
    for i, source in enumerate(sources):
        if source.shape != shape or source.dtype != dtype:
            raise ValueError(
                f"`sources` must have one shape and dtype, got {tuple(source.shape)} {source.dtype} at {i} and "
                f"{tuple(shape)} {dtype} at 0"
            )
    if score_weights.dim() != 2 or score_weights.shape[1:] != shape[-1:] or 0 in score_weights.shape:
        raise ValueError(
            "`score_weights` must have the shape [reads, D] with the D >= 1 of the sources and at least one read, got "
            f"{tuple(score_weights.shape)} and sources {tuple(shape)}"
        )


class _Phase1(torch.autograd.Function):
    """Phase 1 of an implementation, in eager mode."""

    @staticmethod
    def forward(ctx: Any, impl: Phase1Impl, eps: float, score_weights: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        outs, lse, logits, rstd = impl.forward(Phase1Inputs(sources, score_weights, eps))
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.num_reads = impl, len(outs)
        ctx.save_for_backward(score_weights, lse, logits, rstd, *sources)
        return (*outs, *lse.unbind(0), *(sources if impl.passes_sources else ()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        score_weights, lse, logits, rstd, *sources = ctx.saved_tensors
        needs_weights, *needs_sources = ctx.needs_input_grad[2:]
        num_reads = ctx.num_reads
        grad_outs, grad_lses = grads[:num_reads], grads[num_reads : 2 * num_reads]
        passed = grads[2 * num_reads :] or (None,) * len(sources)
        if all(grad is None for grad in grad_outs) and all(grad is None for grad in grad_lses):
            return None, None, None, *passed
        grad_lse = None
        if any(grad is not None for grad in grad_lses):
            grad_lse = torch.stack([lse.new_zeros(lse.shape[1]) if grad is None else grad for grad in grad_lses])
        with torch.no_grad():
            gradients, grad_weights = ctx.impl.backward(
                Phase1GradientInputs(
                    grad_outs, grad_lse, passed, sources, score_weights.to(lse.dtype), lse, logits, rstd, needs_weights
                )
            )
            if grad_weights is not None:
                grad_weights = grad_weights.to(score_weights.dtype)
        results = (
            grad_weights,
            *(grad if needed else None for grad, needed in zip(gradients, needs_sources, strict=True)),
        )
        if torch.is_grad_enabled():
            results = first_derivatives(results, (score_weights, *sources, *grads))
        return None, None, *results


# The op for `torch.compile`. Its sources are no results of it, since results of an op may not be its inputs.


def _torch_op(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    weights = score_weights.to(torch.promote_types(sources[0].dtype, torch.float32))
    outs, lse, _, _ = torch.ops.depthattn.attn_res_group_phase1(list(sources), weights, eps)
    return outs, lse.unbind(0)


def _forward(sources: list[Tensor], score_weights: Tensor, eps: float) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    outs, lse, logits, rstd = PHASE1_TORCH.forward(Phase1Inputs(sources, score_weights, eps))
    return [out.clone(memory_format=torch.contiguous_format) for out in outs], lse, logits.contiguous(), rstd


def _forward_fake(
    sources: list[Tensor], score_weights: Tensor, eps: float
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    first, num_reads = sources[0], score_weights.shape[0]
    num_tokens = math.prod(first.shape[:-1])
    return (
        [first.new_empty(first.shape) for _ in range(num_reads)],
        score_weights.new_empty(num_reads, num_tokens),
        score_weights.new_empty(len(sources), num_reads, num_tokens),
        score_weights.new_empty(len(sources), num_tokens),
    )


def _backward(
    grad_outs: list[Tensor],
    grad_lse: Tensor | None,
    sources: list[Tensor],
    score_weights: Tensor,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
) -> tuple[list[Tensor], Tensor]:
    passed = (None,) * len(sources)
    gradients, grad_weights = PHASE1_TORCH.backward(
        Phase1GradientInputs(grad_outs, grad_lse, passed, sources, score_weights, lse, logits, rstd, True)
    )
    assert grad_weights is not None
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients], grad_weights


def _backward_fake(
    grad_outs: list[Tensor],
    grad_lse: Tensor | None,
    sources: list[Tensor],
    score_weights: Tensor,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
) -> tuple[list[Tensor], Tensor]:
    return [source.new_empty(source.shape) for source in sources], torch.empty_like(score_weights)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    sources, score_weights, _ = inputs
    _, lse, logits, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logits, rstd)
    ctx.save_for_backward(score_weights, lse, logits, rstd, *sources)


def _differentiate(ctx: Any, grad_outs: list[Tensor | None], grad_lse: Tensor | None, *_: object) -> tuple[Any, ...]:
    score_weights, lse, logits, rstd, *sources = ctx.saved_tensors
    grads = [torch.zeros_like(sources[0]) if grad is None else grad for grad in grad_outs]
    gradients, grad_weights = torch.ops.depthattn.attn_res_group_phase1_backward(
        grads, grad_lse, sources, score_weights, lse, logits, rstd
    )
    needs_sources = ctx.needs_input_grad[0]
    return (
        [grad if needed else None for grad, needed in zip(gradients, needs_sources, strict=True)],
        grad_weights,
        None,
    )


def _register_ops() -> None:
    backward = torch.library.custom_op("depthattn::attn_res_group_phase1_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)
    forward = torch.library.custom_op("depthattn::attn_res_group_phase1", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


ATTN_RES_PHASE1: Op[Phase1Impl] = register(Op("attn_res_phase1", PHASE1_TORCH, PHASE1_TRITON, attn_res_phase1_limit))

# A model loaded as remote code imports a second copy of this file, which must use the existing op.
if not hasattr(torch.ops.depthattn, "attn_res_group_phase1"):
    _register_ops()
