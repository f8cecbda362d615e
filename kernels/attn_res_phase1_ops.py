"""Phase 1 of grouped AttnRes reads on a GPU: supported inputs, launches, and ops for `torch.compile`.

`attn_res_phase1_ops` of the package contains the equations and the torch implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_configs import MAX_CHANNELS
from .attn_res_group_configs import MAX_READS_PER_LAUNCH, phase1_config
from .attn_res_group_inputs import Phase1GradientInputs, Phase1Impl, Phase1Inputs, Phase1Result
from .attn_res_phase1 import attn_res_phase1_kernel
from .attn_res_phase1_backward import attn_res_phase1_sources_kernel, attn_res_phase1_weights_kernel
from .launches import aligned, device_table, num_programs, on_device, sum_dtype, tensor_limit


def attn_res_phase1_limit(inputs: Phase1Inputs) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do."""
    first = inputs.sources[0]
    limit = tensor_limit("sources", first)
    if limit is not None:
        return limit
    if first.shape[-1] > MAX_CHANNELS:
        return f"sources must have at most {MAX_CHANNELS} channels, got {first.shape[-1]}"
    if inputs.score_weights.device != first.device:
        return (
            f"`score_weights` must be on the device of the sources, {first.device}, got {inputs.score_weights.device}"
        )
    # "tf32x3" products are only available on NVIDIA GPUs.
    return "AMD GPUs are not supported" if torch.version.hip else None


def attn_res_phase1_triton(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Compute S outputs and log-sum-exps by an op that `torch.compile` supports; arguments as in `Phase1Inputs`."""
    weights = score_weights.to(sum_dtype(sources[0]))
    outs, lse, _, _ = torch.ops.depthattn.attn_res_group_phase1_triton(list(sources), weights, eps)
    return outs, lse.unbind(0)


def _forward(inputs: Phase1Inputs) -> Phase1Result:
    first = inputs.sources[0]
    weights = inputs.score_weights.to(sum_dtype(first)).contiguous()
    num_reads, num_channels = weights.shape
    num_tokens, num_sources = first.numel() // num_channels, len(inputs.sources)
    rows = [aligned(source) for source in inputs.sources]
    outs = [torch.empty_like(rows[0]) for _ in range(num_reads)]
    lse = weights.new_empty(num_reads, num_tokens)
    logits = weights.new_empty(num_sources, num_reads, num_tokens)
    rstd = weights.new_empty(num_sources, num_tokens)
    result = Phase1Result(outs, lse, logits, rstd)
    if num_tokens == 0:
        return result
    with on_device(first):
        table = device_table(first.device, [row.data_ptr() for row in rows])
        for part in _launches(num_reads):
            # With several launches, each writes a matrix of its own that is then copied to the whole.
            whole = len(outs[part]) == num_reads
            part_logits = logits if whole else torch.empty_like(logits[:, part], memory_format=torch.contiguous_format)
            config = phase1_config("forward", len(outs[part]), num_channels)
            attn_res_phase1_kernel[(-(-num_tokens // config.block_t),)](
                table,
                device_table(first.device, [out.data_ptr() for out in outs[part]]),
                weights[part],
                lse[part],
                part_logits,
                rstd,
                rows[0],
                num_tokens,
                num_sources,
                EPS=inputs.eps,
                **config.launch_options(num_channels, len(outs[part]), first.element_size()),
            )
            if not whole:
                logits[:, part] = part_logits
    return result


def _backward(inputs: Phase1GradientInputs) -> tuple[list[Tensor], Tensor | None]:
    first = inputs.sources[0]
    weights = inputs.score_weights.contiguous()
    num_reads, num_channels = weights.shape
    num_tokens = first.numel() // num_channels
    rows = [aligned(source) for source in inputs.sources]
    if num_tokens == 0:
        return [torch.empty_like(row) for row in rows], torch.zeros_like(weights) if inputs.needs_weights else None
    # References are kept until the launch, since tables contain only addresses.
    grad_outs = [None if grad is None else aligned(grad) for grad in inputs.grad_outs]
    passed = [None if grad is None else aligned(grad) for grad in inputs.passed]
    grads: list[Tensor] = []
    grad_weights = []
    with on_device(first):
        for part in _launches(num_reads):
            # The gradients of a launch are passed to the next one.
            earlier, grads = grads or passed, [torch.empty_like(row) for row in rows]
            columns = zip(rows, grads, earlier, strict=True)
            table = device_table(first.device, [_address(matrix) for row in columns for matrix in row])
            factors = _source_gradients(
                inputs, part, table, device_table(first.device, [_address(grad) for grad in grad_outs[part]]), rows[0]
            )
            if inputs.needs_weights:
                grad_weights.append(_weight_gradient(factors, table, rows[0]))
    return grads, torch.cat(grad_weights) if inputs.needs_weights else None


def _source_gradients(
    inputs: Phase1GradientInputs, part: slice, table: Tensor, out_table: Tensor, like: Tensor
) -> Tensor:
    """Compute the gradients of the sources from some of the reads, and return b of `attn_res_phase1_backward`."""
    weights = inputs.score_weights.contiguous()[part]
    num_reads, num_channels = weights.shape
    num_tokens, num_sources = like.numel() // num_channels, len(inputs.sources)
    logits = inputs.logits[:, part].contiguous()
    grad_lse = None if inputs.grad_lse is None else inputs.grad_lse[part].contiguous()
    factors = torch.empty_like(logits)
    config = phase1_config("sources", num_reads, num_channels)
    attn_res_phase1_sources_kernel[(-(-num_tokens // config.block_t),)](
        table,
        out_table,
        weights,
        logits,
        inputs.rstd.contiguous(),
        inputs.lse[part].contiguous(),
        grad_lse,
        torch.empty_like(logits),
        factors,
        like,
        num_tokens,
        num_sources,
        **config.launch_options(num_channels, num_reads, like.element_size()),
    )
    return factors


def _weight_gradient(factors: Tensor, table: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of the score weights of some reads, [reads, D]."""
    num_sources, num_reads, num_tokens = factors.shape
    num_channels = like.shape[-1]
    config = phase1_config("weights", num_reads, num_channels)
    constants = config.launch_options(num_channels, num_reads, like.element_size())
    num_chunks = -(-num_channels // constants["BLOCK_D"])
    num_parts = min(
        -(-num_programs(like.device, config.programs_per_sm) // num_chunks), -(-num_tokens // config.block_t)
    )
    # One row per program, summed in this order.
    parts = factors.new_empty(num_parts, num_reads, num_channels)
    attn_res_phase1_weights_kernel[(num_parts, num_chunks)](
        table, factors, parts, like, num_tokens, num_sources, **constants
    )
    return parts.sum(0)


def _address(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.data_ptr()


def _launches(num_reads: int) -> list[slice]:
    size = MAX_READS_PER_LAUNCH
    return [slice(start, start + size) for start in range(0, num_reads, size)]


PHASE1_TRITON = Phase1Impl(_forward, _backward)


# Ops for `torch.compile`, which does not pass gradients of later uses through the backward.


def _op(sources: list[Tensor], score_weights: Tensor, eps: float) -> tuple[Any, ...]:
    return tuple(_forward(Phase1Inputs(sources, score_weights, eps)))


def _op_fake(sources: list[Tensor], score_weights: Tensor, eps: float) -> tuple[Any, ...]:
    first, num_reads = sources[0], score_weights.shape[0]
    num_tokens = math.prod(first.shape[:-1])
    return (
        [first.new_empty(first.shape) for _ in range(num_reads)],
        score_weights.new_empty(num_reads, num_tokens),
        score_weights.new_empty(len(sources), num_reads, num_tokens),
        score_weights.new_empty(len(sources), num_tokens),
    )


def _op_backward(
    grad_outs: list[Tensor | None],
    grad_lse: Tensor | None,
    sources: list[Tensor],
    score_weights: Tensor,
    lse: Tensor,
    logits: Tensor,
    rstd: Tensor,
) -> tuple[list[Tensor], Tensor]:
    passed = [None] * len(sources)
    inputs = Phase1GradientInputs(grad_outs, grad_lse, passed, sources, score_weights, lse, logits, rstd, True)
    grads, grad_weights = _backward(inputs)
    assert grad_weights is not None
    return grads, grad_weights


def _op_backward_fake(
    grad_outs: list[Tensor | None],
    grad_lse: Tensor | None,
    sources: list[Tensor],
    score_weights: Tensor,
    *_: Tensor,
) -> tuple[list[Tensor], Tensor]:
    return [source.new_empty(source.shape) for source in sources], score_weights.new_empty(score_weights.shape)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    sources, score_weights, _ = inputs
    _, lse, logits, rstd = output
    ctx.mark_non_differentiable(logits, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(score_weights, lse, logits, rstd, *sources)


def _differentiate(ctx: Any, grad_outs: list[Tensor | None], grad_lse: Tensor | None, *_: object) -> tuple:
    score_weights, lse, logits, rstd, *sources = ctx.saved_tensors
    grads, grad_weights = torch.ops.depthattn.attn_res_group_phase1_backward_triton(
        grad_outs, grad_lse, sources, score_weights, lse, logits, rstd
    )
    of_sources, of_weights, _ = ctx.needs_input_grad
    grads = [grad if needed else None for grad, needed in zip(grads, of_sources, strict=True)]
    return grads, grad_weights if of_weights else None, None


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::attn_res_group_phase1_backward_triton",
        _op_backward,
        mutates_args=(),
        schema="(Tensor?[] grad_outs, Tensor? grad_lse, Tensor[] sources, Tensor score_weights, Tensor lse, "
        "Tensor logits, Tensor rstd) -> (Tensor[], Tensor)",
    )
    backward.register_fake(_op_backward_fake)
    forward = torch.library.custom_op(
        "depthattn::attn_res_group_phase1_triton",
        _op,
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weights, float eps) -> (Tensor[], Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_op_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A second copy of this file (remote code) must use the ops of the first.
if not hasattr(torch.ops.depthattn, "attn_res_group_phase1_triton"):
    _register_ops()
