"""Phase 2 of grouped AttnRes reads on a GPU: supported inputs, launches, and ops for `torch.compile`.

`attn_res_phase2_ops` of the package contains the equations and the torch implementation. One source with a prior has
kernels of its own, which load it once in the backward as well; everything else is a read (`attn_res_ops`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_group_configs import phase2_config
from .attn_res_group_inputs import (
    Phase2GradientInputs,
    Phase2Gradients,
    Phase2Impl,
    Phase2Inputs,
    Phase2Result,
    kept_for_backward,
)
from .attn_res_inputs import Prior, PriorGradients, ReadGradientInputs, ReadInputs
from .attn_res_ops import attn_res_read_limit, read_backward, read_forward
from .attn_res_phase2 import attn_res_phase2_backward_kernel, attn_res_phase2_kernel
from .launches import num_programs, on_device, sum_dtype

_NUM_STATS = 3


def attn_res_phase2_limit(inputs: Phase2Inputs) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do."""
    return attn_res_read_limit(inputs.sources, inputs.score_weight)


def attn_res_phase2_triton(inputs: Phase2Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute h and the sources with the update by an op that `torch.compile` supports."""
    sources, score_weight, eps, read_scale, update, prior_out, prior_lse = inputs
    weight = score_weight.to(sum_dtype(sources[0]))
    h, newest, _ = torch.ops.depthattn.attn_res_group_phase2_triton(
        list(sources), weight, eps, read_scale, update, prior_out, prior_lse
    )
    return h, tuple(sources) if update is None else (*sources[:-1], newest)


def _forward(inputs: Phase2Inputs) -> Phase2Result:
    weight = inputs.score_weight.to(sum_dtype(inputs.sources[0]))
    prior = None
    if inputs.prior_out is not None and inputs.prior_lse is not None:
        prior = Prior(inputs.prior_out, inputs.prior_lse)
    if prior is not None and _has_own_kernels(inputs.sources):
        return _one_source(inputs, weight, prior)
    of_read = ReadInputs(list(inputs.sources), weight, inputs.eps, inputs.read_scale)
    h, stats, newest = read_forward(of_read, prior, inputs.update)
    newest = inputs.sources[-1] if inputs.update is None else newest
    return Phase2Result(h, newest, (stats,) if prior is None else (stats, prior.lse))


def _has_own_kernels(sources: Sequence[Tensor]) -> bool:
    # Limits of registers are an option of NVIDIA GPUs.
    return len(sources) == 1 and not torch.version.hip


def _one_source(inputs: Phase2Inputs, weight: Tensor, prior: Prior) -> Phase2Result:
    given, update = inputs.sources[0], inputs.update
    partial = given.contiguous()
    num_channels = partial.shape[-1]
    num_tokens = partial.numel() // num_channels
    h = torch.empty_like(partial)
    total = None if update is None else torch.empty_like(partial)
    newest = given if total is None else total
    stats = weight.new_empty(num_tokens, _NUM_STATS)
    if num_tokens == 0:
        return Phase2Result(h, newest, (stats,))
    config = phase2_config("phase2", num_channels)
    with on_device(partial):
        attn_res_phase2_kernel[(-(-num_tokens // config.block_t),)](
            partial,
            None if update is None else update.contiguous(),
            prior.out.contiguous(),
            prior.lse.contiguous(),
            weight.contiguous(),
            h,
            total,
            stats,
            inputs.read_scale,
            num_tokens,
            EPS=inputs.eps,
            **config.launch_options(num_channels),
        )
    return Phase2Result(h, newest, (stats,))


def _backward(inputs: Phase2GradientInputs) -> Phase2Gradients:
    sources, kept = inputs.sources, inputs.kept
    if not inputs.has_prior:
        grads, grad_weight = read_backward(_of_read(inputs), passed=inputs.passed)
        return Phase2Gradients(grads, None, None, grad_weight if inputs.needs_weight else None)
    if kept is None:
        raise ValueError("the backward of a read with a prior needs h or the prior, got neither")
    if _has_own_kernels(sources):
        return _one_source_backward(inputs, kept)
    grad_prior = torch.empty_like(kept, memory_format=torch.contiguous_format)
    lse = inputs.stats[1]
    grad_lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
    prior = PriorGradients(kept, inputs.keeps_read, lse, grad_prior, grad_lse)
    grads, grad_weight = read_backward(_of_read(inputs), prior=prior, passed=inputs.passed)
    return Phase2Gradients(grads, grad_prior, grad_lse, grad_weight if inputs.needs_weight else None)


def _of_read(inputs: Phase2GradientInputs) -> ReadGradientInputs:
    sources = list(inputs.sources)
    needs_grad = [True] * len(sources)
    return ReadGradientInputs(
        inputs.grad_h, sources, inputs.score_weight, inputs.stats[0], inputs.read_scale, needs_grad
    )


def _one_source_backward(inputs: Phase2GradientInputs, kept: Tensor) -> Phase2Gradients:
    total, weight, passed = inputs.sources[0].contiguous(), inputs.score_weight, inputs.passed[0]
    num_channels = total.shape[-1]
    num_tokens = total.numel() // num_channels
    grad_value, grad_prior = torch.empty_like(total), torch.empty_like(total)
    grad_lse = weight.new_empty(num_tokens)
    if num_tokens == 0:
        nothing = torch.zeros_like(weight) if inputs.needs_weight else None
        return Phase2Gradients([grad_value], grad_prior, grad_lse, nothing)
    config = phase2_config("phase2_backward", num_channels)
    grid = min(num_programs(total.device, config.programs_per_sm), num_tokens)
    grad_weights = weight.new_empty(grid, num_channels)
    with on_device(total):
        attn_res_phase2_backward_kernel[(grid,)](
            inputs.grad_h.contiguous(),
            None if passed is None else passed.contiguous(),
            total,
            kept.contiguous(),
            weight.contiguous(),
            inputs.stats[0],
            grad_value,
            grad_prior,
            grad_lse,
            grad_weights,
            inputs.read_scale,
            num_tokens,
            KEEPS_READ=inputs.keeps_read,
            **config.launch_options(num_channels),
        )
    grad_weight = grad_weights.sum(0) if inputs.needs_weight else None
    return Phase2Gradients([grad_value], grad_prior, grad_lse, grad_weight)


PHASE2_TRITON = Phase2Impl(_forward, _backward)


# Ops for `torch.compile`, which passes no gradients of later uses through the backward but that of the newest source.


def _op(
    sources: list[Tensor],
    score_weight: Tensor,
    eps: float,
    read_scale: float,
    update: Tensor | None,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    h, newest, stats = _forward(Phase2Inputs(sources, score_weight, eps, read_scale, update, prior_out, prior_lse))
    # An input must not be a result.
    return h, h.new_empty(0) if update is None else newest, stats[0]


def _op_fake(
    sources: list[Tensor],
    score_weight: Tensor,
    eps: float,
    read_scale: float,
    update: Tensor | None,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    first = sources[0]
    newest = first.new_empty(0 if update is None else first.shape)
    has_own_kernels = prior_out is not None and _has_own_kernels(sources)
    num_stats = _NUM_STATS if has_own_kernels else 2 + 2 * len(sources)
    return first.new_empty(first.shape), newest, score_weight.new_empty(math.prod(first.shape[:-1]), num_stats)


def _op_backward(
    grad_h: Tensor,
    grad_newest: Tensor | None,
    sources: list[Tensor],
    score_weight: Tensor,
    read_scale: float,
    stats: Tensor,
    prior_lse: Tensor | None,
    kept: Tensor | None,
    keeps_read: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    has_prior = prior_lse is not None
    all_stats = (stats,) if prior_lse is None else (stats, prior_lse)
    passed = [*[None] * (len(sources) - 1), grad_newest]
    grads, grad_prior, grad_lse, grad_weight = _backward(
        Phase2GradientInputs(
            grad_h, passed, sources, score_weight, read_scale, all_stats, kept, keeps_read, has_prior, True
        )
    )
    assert grad_weight is not None
    if grad_prior is None or grad_lse is None:
        grad_prior, grad_lse = grad_h.new_empty(0), score_weight.new_empty(0)
    return list(grads), grad_prior, grad_lse, grad_weight


def _op_backward_fake(
    grad_h: Tensor,
    grad_newest: Tensor | None,
    sources: list[Tensor],
    score_weight: Tensor,
    read_scale: float,
    stats: Tensor,
    prior_lse: Tensor | None,
    *_: object,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    return (
        [source.new_empty(source.shape) for source in sources],
        grad_h.new_empty(0 if prior_lse is None else grad_h.shape),
        score_weight.new_empty(0 if prior_lse is None else prior_lse.shape),
        score_weight.new_empty(score_weight.shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    sources, score_weight, _, ctx.read_scale, update, prior_out, prior_lse = inputs
    h, newest, stats = output
    ctx.has_update, ctx.has_prior = update is not None, prior_out is not None
    kept, ctx.keeps_read = kept_for_backward(h, prior_out)
    ctx.mark_non_differentiable(stats, *(() if ctx.has_update else (newest,)))
    ctx.set_materialize_grads(False)
    of_prior = [kept, prior_lse] if ctx.has_prior else []
    sources = [*sources[:-1], newest] if ctx.has_update else sources
    ctx.save_for_backward(score_weight, stats, *of_prior, *sources)


def _differentiate(ctx: Any, grad_h: Tensor | None, grad_newest: Tensor | None, *_: object) -> tuple:
    score_weight, stats, *rest = ctx.saved_tensors
    kept, prior_lse = rest[:2] if ctx.has_prior else (None, None)
    sources = rest[2:] if ctx.has_prior else rest
    grad_newest = grad_newest if ctx.has_update else None
    if grad_h is None:
        return [*[None] * (len(sources) - 1), grad_newest], None, None, None, grad_newest, None, None
    grads, grad_prior, grad_lse, grad_weight = torch.ops.depthattn.attn_res_group_phase2_backward_triton(
        grad_h, grad_newest, sources, score_weight, ctx.read_scale, stats, prior_lse, kept, ctx.keeps_read
    )
    of_sources, of_weight, _, _, of_update, of_prior, of_lse = ctx.needs_input_grad
    return (
        [grad if needed else None for grad, needed in zip(grads, of_sources, strict=True)],
        grad_weight if of_weight else None,
        None,
        None,
        grads[-1] if of_update else None,
        grad_prior if of_prior else None,
        grad_lse if of_lse else None,
    )


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::attn_res_group_phase2_backward_triton",
        _op_backward,
        mutates_args=(),
        schema="(Tensor grad_h, Tensor? grad_newest, Tensor[] sources, Tensor score_weight, float read_scale, "
        "Tensor stats, Tensor? prior_lse, Tensor? kept, bool keeps_read) -> (Tensor[], Tensor, Tensor, Tensor)",
    )
    backward.register_fake(_op_backward_fake)
    forward = torch.library.custom_op(
        "depthattn::attn_res_group_phase2_triton",
        _op,
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale, Tensor? update, "
        "Tensor? prior_out, Tensor? prior_lse) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_op_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A second copy of this file (remote code) must use the ops of the first.
if not hasattr(torch.ops.depthattn, "attn_res_group_phase2_triton"):
    _register_ops()
