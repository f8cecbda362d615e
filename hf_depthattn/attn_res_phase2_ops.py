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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_ops import SOURCE_DTYPES
from .attn_res_phase2_torch import PHASE2_TORCH
from .first_derivative import first_derivatives
from .kernels.attn_res_group_inputs import Phase2GradientInputs, Phase2Impl, Phase2Inputs
from .op_dispatch import Op, register, resolve


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
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return attn_res_phase2_reference(inputs)
    sources, score_weight, eps, read_scale, update, prior_out, prior_lse = inputs
    phase2 = resolve(ATTN_RES_PHASE2, impl, sources[0].device, (inputs,))
    if torch.compiler.is_compiling():
        newest = sources[-1] if update is None else sources[-1] + update
        weight = score_weight.to(torch.promote_types(newest.dtype, torch.float32))
        through = (*sources[:-1], newest)
        return _op_of(phase2)(list(through), weight, eps, read_scale, prior_out, prior_lse)[0], through
    if not torch.is_grad_enabled():
        h, newest, _ = phase2.forward(inputs)
        return h, (*sources[:-1], newest)
    h, *through = _Phase2.apply(phase2, eps, read_scale, prior_out, prior_lse, score_weight, update, *sources)
    # A frozen source stays frozen: as a result of the op, it would need a gradient.
    for i, source in enumerate(sources):
        if not source.requires_grad and (i < len(sources) - 1 or update is None or not update.requires_grad):
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
    for name, tensor in (*(("sources", source) for source in sources[1:]), ("update", update), ("prior_out", prior_out)):
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
        # o in 16 bits, since h would have the error of its rounding; otherwise h, which the next norm keeps as well.
        keeps_read = prior_out is None or h.dtype in (torch.float32, torch.float64)
        ctx.impl, ctx.read_scale, ctx.has_prior, ctx.keeps_read = impl, read_scale, prior_out is not None, keeps_read
        ctx.save_for_backward(score_weight, h if keeps_read else prior_out, *sources[:-1], newest, *stats)
        return h, *sources[:-1], newest

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, *passed: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[3:]
        if grad_h is None:
            return None, None, None, None, None, None, passed[-1] if needs_grad[3] else None, *passed
        score_weight, kept, *rest = ctx.saved_tensors
        sources, stats = rest[: len(passed)], tuple(rest[len(passed) :])
        with torch.no_grad():
            weight = score_weight.to(torch.promote_types(kept.dtype, torch.float32))
            grads, grad_prior, grad_lse, grad_weight = ctx.impl.backward(
                Phase2GradientInputs(
                    grad_h, passed, sources, weight, ctx.read_scale, stats, kept, ctx.keeps_read, ctx.has_prior,
                    needs_grad[2],
                )  # fmt: skip
            )
            if grad_weight is not None:
                grad_weight = grad_weight.to(score_weight.dtype)
        all_grads = (grad_prior, grad_lse, grad_weight, grads[-1], *grads)
        if torch.is_grad_enabled():
            all_grads = first_derivatives(all_grads, (score_weight, kept, *sources))
        return None, None, None, *(grad if needed else None for grad, needed in zip(all_grads, needs_grad, strict=True))


# The op for `torch.compile`. Its sources are no results of it, since results of an op may not be its inputs.


def _op_of(impl: Phase2Impl) -> Any:
    return torch.ops.depthattn.attn_res_group_phase2


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




ATTN_RES_PHASE2: Op[Phase2Impl] = register(Op("attn_res_phase2", PHASE2_TORCH))
