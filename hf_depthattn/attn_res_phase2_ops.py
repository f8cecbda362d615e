r"""Grouped AttnRes reads, phase 2: add the newer sources to one read of phase 1.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. With o and lse of one read from phase 1 (`attn_res_phase1_ops`),
v_1 ... v_R the sources that phase 1 has not read, x_i their logits (`attn_res_ops`), and y the output of the previous
sublayer, not yet added to the open block v_R:

    v_R <- round(v_R + y)
    [p_0, p_1, ..., p_R] = softmax([lse, x_1, ..., x_R])
    h = read_scale (p_0 o + sum_i p_i v_i)

h equals `attn_res_read` of all sources: the parts of a softmax are merged by their log-sum-exps.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .attn_res_ops import SOURCE_DTYPES
from .attn_res_phase2_torch import PHASE2_TORCH
from .first_derivative import first_derivatives
from .kernels.attn_res_group_inputs import Phase2GradientInputs, Phase2Impl, Phase2Inputs, kept_for_backward
from .kernels.attn_res_phase2_ops import PHASE2_TRITON, attn_res_phase2_limit, attn_res_phase2_triton
from .op_dispatch import Op, needs_reference, register, resolve


def attn_res_phase2(inputs: Phase2Inputs, *, impl: str = "auto") -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add the newer sources to one read of phase 1 (arXiv 2603.15031, Algorithm 1, phase 2).

    Args:
        inputs: the newer sources, the score weight, the result of phase 1 and options.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        h [..., D], and the sources, the update added to the last, for later uses: their gradients then pass through
        the backward of this op, which adds its own.

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    check_phase2(inputs)
    if needs_reference():
        return attn_res_phase2_reference(inputs)
    sources, score_weight, eps, read_scale, update, prior_out, prior_lse = inputs
    phase2 = resolve(ATTN_RES_PHASE2, impl, sources[0].device, (inputs,))
    if torch.compiler.is_compiling():
        return attn_res_phase2_triton(inputs) if phase2 is PHASE2_TRITON else _torch_op(inputs)
    if not torch.is_grad_enabled():
        h, newest, _ = phase2.forward(inputs)
        return h, (*sources[:-1], newest)
    h, *through = _Phase2.apply(phase2, eps, read_scale, prior_out, prior_lse, score_weight, update, *sources)
    # A frozen source stays frozen: as a result of the op, it would need a gradient.
    for i, source in enumerate(sources):
        if not source.requires_grad and (i < len(sources) - 1 or update is None):
            through[i] = source
        elif not source.requires_grad and not update.requires_grad:
            through[i] = through[i].detach()
    return h, tuple(through)


def attn_res_phase2_reference(inputs: Phase2Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute `attn_res_phase2` with autograd; arguments as there."""
    sources = tuple(inputs.sources)
    if inputs.update is not None:
        sources = (*sources[:-1], sources[-1] + inputs.update)
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    weight = inputs.score_weight.to(dtype)
    values = [source.to(dtype) for source in sources]
    logits = [(v * weight).sum(-1) * torch.rsqrt(v.square().mean(-1) + inputs.eps) for v in values]
    if inputs.prior_out is not None and inputs.prior_lse is not None:
        values.insert(0, inputs.prior_out.to(dtype))
        logits.insert(0, inputs.prior_lse.view(sources[0].shape[:-1]))
    weights = torch.stack(logits).softmax(0).unsqueeze(-1)  # [R + 1, ..., 1]
    h = inputs.read_scale * sum(p * v for p, v in zip(weights.unbind(0), values, strict=True))
    return h.to(sources[0].dtype), sources


def check_phase2(inputs: Phase2Inputs) -> None:
    """Raise ValueError for invalid inputs of `attn_res_phase2`; the kernels do not check shapes."""
    sources, score_weight, _, _, update, prior_out, prior_lse = inputs
    if len(sources) == 0:
        raise ValueError("`sources` must contain at least one tensor, got an empty sequence")
    first = sources[0]
    shape, dtype = first.shape, first.dtype
    if dtype not in SOURCE_DTYPES:
        raise ValueError(f"`sources` must have one of the dtypes {SOURCE_DTYPES}, got {dtype}")
    for name, tensor in (
        *(("sources", source) for source in sources[1:]),
        ("update", update),
        ("prior_out", prior_out),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(
                f"`{name}` must have the shape and dtype of the first source, {tuple(shape)} {dtype}, got "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )
    if score_weight.shape != shape[-1:] or shape[-1] == 0:
        raise ValueError(
            f"`score_weight` must have the shape [D] with the D >= 1 of the sources, {tuple(shape)}, got "
            f"{tuple(score_weight.shape)}"
        )
    if (prior_out is None) != (prior_lse is None):
        raise ValueError("`prior_out` and `prior_lse` must be given together")
    if prior_lse is not None and (prior_lse.dim() != 1 or prior_lse.shape[0] * shape[-1] != first.numel()):
        raise ValueError(
            f"`prior_lse` must have the shape [tokens] of sources {tuple(shape)}, got {tuple(prior_lse.shape)}"
        )


class _Phase2(torch.autograd.Function):
    """Phase 2 of an implementation, in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: Phase2Impl,
        eps: float,
        read_scale: float,
        prior_out: Tensor | None,
        prior_lse: Tensor | None,
        score_weight: Tensor,
        update: Tensor | None,
        *sources: Tensor,
    ) -> tuple[Tensor, ...]:
        h, newest, stats = impl.forward(
            Phase2Inputs(sources, score_weight, eps, read_scale, update, prior_out, prior_lse)
        )
        ctx.set_materialize_grads(False)
        kept, keeps_read = kept_for_backward(h, prior_out)
        ctx.impl, ctx.read_scale, ctx.has_prior, ctx.keeps_read = impl, read_scale, prior_out is not None, keeps_read
        ctx.num_sources = len(sources)
        ctx.save_for_backward(score_weight, kept, *sources[:-1], newest, *stats)
        return h, *sources[:-1], newest

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, *passed: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[3:]
        if grad_h is None:
            return None, None, None, None, None, None, passed[-1] if needs_grad[3] else None, *passed
        score_weight, kept, *rest = ctx.saved_tensors
        sources, stats = rest[: ctx.num_sources], tuple(rest[ctx.num_sources :])
        weight = score_weight.detach().to(stats[0].dtype)
        gradient_inputs = Phase2GradientInputs(
            grad_h, passed, sources, weight, ctx.read_scale, stats, kept, ctx.keeps_read, ctx.has_prior,
            needs_grad[2],
        )  # fmt: skip
        with torch.no_grad():
            grads, grad_prior, grad_lse, grad_weight = ctx.impl.backward(gradient_inputs)
        if grad_weight is not None and grad_weight.dtype != score_weight.dtype:
            grad_weight = grad_weight.to(score_weight.dtype)
        results = (grad_prior, grad_lse, grad_weight, grads[-1], *grads)
        if torch.is_grad_enabled():
            results = first_derivatives(results, (grad_h, kept, score_weight, *sources, *passed))
        if not all(needs_grad):
            results = tuple(grad if needed else None for grad, needed in zip(results, needs_grad, strict=True))
        return None, None, None, *results


# The op for `torch.compile`. Its sources are no results of it, since results of an op may not be its inputs.


def _torch_op(inputs: Phase2Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    sources, score_weight, eps, read_scale, update, prior_out, prior_lse = inputs
    newest = sources[-1] if update is None else sources[-1] + update
    weight = score_weight.to(torch.promote_types(newest.dtype, torch.float32))
    through = (*sources[:-1], newest)
    h, _ = torch.ops.depthattn.attn_res_group_phase2(list(through), weight, eps, read_scale, prior_out, prior_lse)
    return h, through


def _forward(
    sources: list[Tensor],
    score_weight: Tensor,
    eps: float,
    read_scale: float,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    inputs = Phase2Inputs(sources, score_weight, eps, read_scale, None, prior_out, prior_lse)
    h, _, stats = PHASE2_TORCH.forward(inputs)
    # Results of an op may not share memory.
    return h, [stat.clone() for stat in stats]


def _forward_fake(
    sources: list[Tensor],
    score_weight: Tensor,
    eps: float,
    read_scale: float,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    first, num_sources = sources[0], len(sources)
    h, num_tokens = first.new_empty(first.shape), math.prod(first.shape[:-1])
    if prior_out is not None and num_sources == 1:
        return h, [score_weight.new_empty(*first.shape[:-1], 1) for _ in range(3)]
    numbers = [num_sources + (prior_out is not None), num_sources, num_sources]
    return h, [score_weight.new_empty(number, num_tokens) for number in numbers]


def _backward(
    grad_h: Tensor,
    sources: list[Tensor],
    score_weight: Tensor,
    read_scale: float,
    stats: list[Tensor],
    kept: Tensor | None,
    keeps_read: bool,
    has_prior: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources, `prior_out` and `prior_lse` if there are, and that of the weight."""
    passed = (None,) * len(sources)
    grads, grad_prior, grad_lse, grad_weight = PHASE2_TORCH.backward(
        Phase2GradientInputs(
            grad_h, passed, sources, score_weight, read_scale, tuple(stats), kept, keeps_read, has_prior, True
        )
    )
    assert grad_weight is not None
    # Results of an op may not share memory.
    results = [grad.clone() for grad in grads]
    if grad_prior is not None and grad_lse is not None:
        results += [grad_prior, grad_lse]
    return results, grad_weight


def _backward_fake(
    grad_h: Tensor,
    sources: list[Tensor],
    score_weight: Tensor,
    read_scale: float,
    stats: list[Tensor],
    kept: Tensor | None,
    keeps_read: bool,
    has_prior: bool,
) -> tuple[list[Tensor], Tensor]:
    results = [source.new_empty(source.shape) for source in sources]
    if has_prior:
        results += [grad_h.new_empty(grad_h.shape), score_weight.new_empty(math.prod(grad_h.shape[:-1]))]
    return results, torch.empty_like(score_weight)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    sources, score_weight, _, ctx.read_scale, prior_out, _ = inputs
    h, stats = output
    ctx.has_prior = prior_out is not None
    kept, ctx.keeps_read = kept_for_backward(h, prior_out)
    ctx.mark_non_differentiable(*stats)
    ctx.save_for_backward(score_weight, kept, *stats, *sources)


def _differentiate(ctx: Any, grad_h: Tensor, _: object) -> tuple[Any, ...]:
    score_weight, kept, gate, x, r, *sources = ctx.saved_tensors
    grads, grad_weight = torch.ops.depthattn.attn_res_group_phase2_backward(
        grad_h, sources, score_weight, ctx.read_scale, [gate, x, r], kept, ctx.keeps_read, ctx.has_prior
    )
    needs_sources = ctx.needs_input_grad[0]
    of_prior = grads[len(sources) :] or (None, None)
    of_sources = [g if needed else None for g, needed in zip(grads[: len(sources)], needs_sources, strict=True)]
    return of_sources, grad_weight, None, None, *of_prior


def _register_ops() -> None:
    backward = torch.library.custom_op("depthattn::attn_res_group_phase2_backward", _backward, mutates_args=())
    backward.register_fake(_backward_fake)
    forward = torch.library.custom_op("depthattn::attn_res_group_phase2", _forward, mutates_args=())
    forward.register_fake(_forward_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


ATTN_RES_PHASE2: Op[Phase2Impl] = register(Op("attn_res_phase2", PHASE2_TORCH, PHASE2_TRITON, attn_res_phase2_limit))

# A model loaded as remote code imports a second copy of this file, which must use the existing op.
if not hasattr(torch.ops.depthattn, "attn_res_group_phase2"):
    _register_ops()
