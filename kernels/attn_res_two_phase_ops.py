"""Block AttnRes in two phases on a GPU: supported inputs, launches, and ops for `torch.compile` and autograd.

`attn_res_phase1_triton` and `attn_res_phase2_triton` have the signatures of the torch implementations in
`experimental.attn_res_two_phase_ops`, which contains the equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attn_res_configs import MAX_CHANNELS
from .attn_res_phase1 import attn_res_phase1_logits_kernel, attn_res_phase1_mix_kernel
from .attn_res_phase1_backward import attn_res_phase1_dots_kernel, attn_res_phase1_grads_kernel
from .attn_res_phase2 import attn_res_phase2_backward_kernel, attn_res_phase2_kernel
from .attn_res_two_phase_configs import MAX_READS_PER_LAUNCH, phase1_config, phase2_config
from .attn_res_two_phase_inputs import Phase2GradientInputs, Phase2Inputs
from .launches import aligned, device_table, num_programs, on_device, sum_dtype, tensor_limit

_NUM_STATS = 3


def attn_res_two_phase_limit(source: Tensor) -> str | None:
    """Return why the kernels do not support this source, or None if they do."""
    limit = tensor_limit("sources", source)
    if limit is None and source.shape[-1] > MAX_CHANNELS:
        limit = f"sources must have at most {MAX_CHANNELS} channels, got {source.shape[-1]}"
    if limit is None and torch.version.hip:
        # "tf32x3" products are only available on NVIDIA GPUs.
        limit = "AMD GPUs are not supported"
    return limit


def attn_res_phase1_triton(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute `attn_res_phase1` of `experimental.attn_res_two_phase_ops`; arguments as there."""
    outs, lses, _, _ = torch.ops.depthattn.attn_res_phase1_triton(
        list(sources), score_weights.to(sum_dtype(sources[0])), eps
    )
    return outs, lses


def attn_res_phase2_triton(
    partial: Tensor,
    update: Tensor | None,
    seq_out: Tensor,
    seq_lse: Tensor,
    score_weight: Tensor,
    *,
    eps: float,
    read_scale: float,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `attn_res_phase2` of `experimental.attn_res_two_phase_ops`; arguments as there."""
    weight = score_weight.to(sum_dtype(partial))
    out, total, _ = torch.ops.depthattn.attn_res_phase2_triton(
        partial, update, seq_out, seq_lse, weight, eps, read_scale, norm_weight, norm_eps
    )
    return out, partial if update is None else total


def _phase1(
    sources: list[Tensor], score_weights: Tensor, eps: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Return o and lse of every read, and the statistics x [N, S, tokens] and r [N, tokens]."""
    first = sources[0]
    num_reads, num_channels = score_weights.shape
    num_tokens, num_sources = first.numel() // num_channels, len(sources)
    rows = [aligned(source) for source in sources]
    outs = [torch.empty_like(rows[0]) for _ in range(num_reads)]
    lse = score_weights.new_empty(num_reads, num_tokens)
    logits = score_weights.new_empty(num_sources, num_reads, num_tokens)
    rstd = score_weights.new_empty(num_sources, num_tokens)
    if num_tokens == 0:
        return outs, _copies(lse, first.shape[:-1]), logits, rstd
    score_weights = score_weights.contiguous()
    with on_device(first):
        table = device_table(first.device, [row.data_ptr() for row in rows])
        for group in _groups(num_reads):
            # With several groups of reads, each writes a matrix of its own that is then copied to the whole.
            whole = len(group) == num_reads
            group_logits = logits if whole else logits.new_empty(num_sources, len(group), num_tokens)
            config = phase1_config("logits", len(group))
            grid = (-(-num_tokens // config.block_t), num_sources)
            attn_res_phase1_logits_kernel[grid](
                table,
                score_weights[group.start : group.stop],
                group_logits,
                rstd,
                rows[0],
                num_tokens,
                EPS=eps,
                **config.launch_options(num_channels, len(group)),
            )
            config = phase1_config("mix", len(group))
            grid = (-(-num_tokens // config.block_t), -(-num_channels // config.block_d))
            attn_res_phase1_mix_kernel[grid](
                table,
                group_logits,
                device_table(first.device, [outs[s].data_ptr() for s in group]),
                lse[group.start : group.stop],
                rows[0],
                num_tokens,
                num_sources,
                **config.launch_options(num_channels, len(group)),
            )
            if not whole:
                logits[:, group.start : group.stop] = group_logits
    return outs, _copies(lse, first.shape[:-1]), logits, rstd


def _phase1_backward(
    grad_outs: list[Tensor],
    grad_lses: list[Tensor],
    sources: list[Tensor],
    score_weights: Tensor,
    lses: list[Tensor],
    logits: Tensor,
    rstd: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources and of the score weights."""
    first = sources[0]
    num_reads, num_channels = score_weights.shape
    num_tokens, num_sources = first.numel() // num_channels, len(sources)
    rows = [aligned(source) for source in sources]
    grads = [torch.empty_like(row) for row in rows]
    if num_tokens == 0:
        return grads, torch.zeros_like(score_weights)
    grad_outs = [aligned(grad) for grad in grad_outs]
    score_weights = score_weights.contiguous()
    grad_weights = []
    is_one_launch = num_reads <= MAX_READS_PER_LAUNCH
    totals = [] if is_one_launch else [torch.zeros_like(row, dtype=score_weights.dtype) for row in rows]
    with on_device(first):
        for group in _groups(num_reads):
            part = slice(group.start, group.stop)
            numbers = [
                number for row, grad in zip(rows, grads, strict=True) for number in (row.data_ptr(), grad.data_ptr())
            ]
            table = device_table(first.device, numbers)
            out_table = device_table(first.device, [grad.data_ptr() for grad in grad_outs[part]])
            group_logits = logits if len(group) == num_reads else logits[:, part].contiguous()
            dots = torch.empty_like(group_logits)
            config = phase1_config("dots", len(group))
            num_programs_dots = num_sources * -(-num_tokens // config.block_t)
            constants = config.launch_options(num_channels, len(group))
            attn_res_phase1_dots_kernel[(num_programs_dots,)](
                table, out_table, dots, rows[0], num_tokens, num_sources, **constants
            )
            config = phase1_config("grads", len(group))
            num_chunks = -(-num_channels // config.block_d)
            grid = (min(-(-num_programs(first.device, config.programs_per_sm) // num_chunks), num_tokens), num_chunks)
            shares = score_weights.new_empty(grid[0], len(group), num_channels)
            attn_res_phase1_grads_kernel[grid](
                table,
                out_table,
                score_weights[part],
                group_logits,
                rstd,
                torch.stack(lses[part]),
                torch.stack(grad_lses[part]),
                dots,
                shares,
                rows[0],
                num_tokens,
                num_sources,
                **config.launch_options(num_channels, len(group)),
            )
            grad_weights.append(shares.sum(0))
            # The next group of reads overwrites these gradients.
            for total, grad in zip(totals, grads, strict=not is_one_launch):
                total.add_(grad)
    if not is_one_launch:
        grads = [total.to(first.dtype) for total in totals]
    return grads, torch.cat(grad_weights)


def _phase2(inputs: Phase2Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, v (empty without an update) and the statistics [tokens, 3]."""
    partial, update, seq_out, seq_lse, score_weight, eps, read_scale, norm_weight, norm_eps = inputs
    num_channels = partial.shape[-1]
    num_tokens = partial.numel() // num_channels
    partial = partial.contiguous()
    out = torch.empty_like(partial)
    total = torch.empty_like(partial) if update is not None else partial.new_empty(0)
    stats = score_weight.new_empty(num_tokens, _NUM_STATS)
    if num_tokens == 0:
        return out, total, stats
    config = phase2_config("phase2", num_channels)
    with on_device(partial):
        attn_res_phase2_kernel[(-(-num_tokens // config.block_t),)](
            partial,
            None if update is None else update.contiguous(),
            seq_out.contiguous(),
            seq_lse.contiguous(),
            score_weight.contiguous(),
            None if norm_weight is None else norm_weight.contiguous(),
            out,
            None if update is None else total,
            stats,
            read_scale,
            num_tokens,
            EPS=eps,
            NORM_EPS=norm_eps,
            **config.launch_options(num_channels),
        )
    return out, total, stats


def _phase2_backward(inputs: Phase2GradientInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of v, o, lse, the score weight and the norm's weight (empty without one)."""
    grad_out, grad_total, total, seq_out, seq_lse, score_weight, norm_weight, stats, read_scale = inputs
    num_channels = total.shape[-1]
    num_tokens = total.numel() // num_channels
    total, seq_out = total.contiguous(), seq_out.contiguous()
    grad_value, grad_seq = torch.empty_like(total), torch.empty_like(seq_out)
    grad_lse = torch.empty_like(seq_lse, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        norm_grad = score_weight.new_zeros(0 if norm_weight is None else num_channels)
        return grad_value, grad_seq, grad_lse, torch.zeros_like(score_weight), norm_grad
    config = phase2_config("phase2_backward", num_channels)
    grid = min(num_programs(total.device, config.programs_per_sm), num_tokens)
    grad_weight = score_weight.new_empty(grid, num_channels)
    norm_grads = None if norm_weight is None else score_weight.new_zeros(grid, num_channels)
    with on_device(total):
        attn_res_phase2_backward_kernel[(grid,)](
            grad_out.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            total,
            seq_out,
            seq_lse.contiguous(),
            score_weight.contiguous(),
            None if norm_weight is None else norm_weight.contiguous(),
            stats,
            grad_value,
            grad_seq,
            grad_lse,
            grad_weight,
            norm_grads,
            read_scale,
            num_tokens,
            **config.launch_options(num_channels),
        )
    norm_grad = score_weight.new_empty(0) if norm_grads is None else norm_grads.sum(0)
    return grad_value, grad_seq, grad_lse, grad_weight.sum(0), norm_grad


def _groups(num_reads: int) -> list[range]:
    size = MAX_READS_PER_LAUNCH
    return [range(start, min(start + size, num_reads)) for start in range(0, num_reads, size)]


def _copies(lse: Tensor, shape: torch.Size) -> list[Tensor]:
    """Return the rows of a matrix as separate tensors, since an op must not return views of the same buffer."""
    return [row.reshape(shape).clone() for row in lse]


def _phase1_fake(sources, score_weights, eps):
    first = sources[0]
    num_tokens = math.prod(first.shape[:-1])
    reads = range(score_weights.shape[0])
    return (
        [first.new_empty(first.shape) for _ in reads],
        [score_weights.new_empty(first.shape[:-1]) for _ in reads],
        score_weights.new_empty(len(sources), len(reads), num_tokens),
        score_weights.new_empty(len(sources), num_tokens),
    )


def _phase1_backward_fake(grad_outs, grad_lses, sources, score_weights, lses, logits, rstd):
    return [source.new_empty(source.shape) for source in sources], score_weights.new_empty(score_weights.shape)


def _phase2_fake(inputs: Phase2Inputs) -> tuple[Tensor, Tensor, Tensor]:
    partial = inputs.partial
    total = partial.new_empty(0 if inputs.update is None else partial.shape)
    stats = inputs.score_weight.new_empty(math.prod(partial.shape[:-1]), _NUM_STATS)
    return partial.new_empty(partial.shape), total, stats


def _phase2_backward_fake(inputs: Phase2GradientInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    score_weight = inputs.score_weight
    return (
        inputs.total.new_empty(inputs.total.shape),
        inputs.seq_out.new_empty(inputs.seq_out.shape),
        inputs.seq_lse.new_empty(inputs.seq_lse.shape),
        score_weight.new_empty(score_weight.shape),
        score_weight.new_empty(0 if inputs.norm_weight is None else score_weight.shape),
    )


def _save_phase1(ctx, inputs, output) -> None:
    sources, score_weights, _ = inputs
    outs, lses, logits, rstd = output
    ctx.mark_non_differentiable(logits, rstd)
    ctx.set_materialize_grads(False)
    ctx.num_reads = len(outs)
    ctx.save_for_backward(score_weights, logits, rstd, *lses, *sources)


def _differentiate_phase1(ctx, grad_outs, grad_lses, *_):
    score_weights, logits, rstd, *rest = ctx.saved_tensors
    lses, sources = rest[: ctx.num_reads], rest[ctx.num_reads :]
    # A read whose result is not used has no gradient.
    grad_outs = [torch.zeros_like(sources[0]) if grad is None else grad for grad in grad_outs]
    grad_lses = [torch.zeros_like(lse) if grad is None else grad for grad, lse in zip(grad_lses, lses, strict=True)]
    grads, grad_weights = torch.ops.depthattn.attn_res_phase1_triton_backward(
        grad_outs, grad_lses, sources, score_weights, lses, logits, rstd
    )
    of_sources, of_weights, _ = ctx.needs_input_grad
    grads = [grad if needed else None for grad, needed in zip(grads, of_sources, strict=True)]
    return grads, grad_weights if of_weights else None, None


def _save_phase2(ctx, inputs, output) -> None:
    partial, update, seq_out, seq_lse, score_weight, _, ctx.read_scale, norm_weight, _ = inputs
    _, total, stats = output
    ctx.mark_non_differentiable(stats, *(() if update is not None else (total,)))
    ctx.set_materialize_grads(False)
    ctx.has_update, ctx.has_norm = update is not None, norm_weight is not None
    value = partial if update is None else total
    ctx.save_for_backward(value, seq_out, seq_lse, score_weight, stats, *([norm_weight] if ctx.has_norm else []))


def _differentiate_phase2(ctx, grad_out, grad_total, _):
    value, seq_out, seq_lse, score_weight, stats, *norm = ctx.saved_tensors
    norm_weight = norm[0] if norm else None
    if grad_out is None:
        grad_out = torch.zeros_like(value)
    of_value, of_seq, of_lse, of_weight, of_norm = torch.ops.depthattn.attn_res_phase2_triton_backward(
        grad_out,
        grad_total if ctx.has_update else None,
        value,
        seq_out,
        seq_lse,
        score_weight,
        norm_weight,
        stats,
        ctx.read_scale,
    )
    needs = ctx.needs_input_grad
    return (
        of_value if needs[0] else None,
        of_value if ctx.has_update and needs[1] else None,
        of_seq if needs[2] else None,
        of_lse if needs[3] else None,
        of_weight if needs[4] else None,
        None,
        None,
        of_norm.to(norm_weight.dtype) if norm_weight is not None and needs[7] else None,
        None,
    )


def _register_ops() -> None:
    def op(name, function, fake, schema, differentiate=None, setup_context=None) -> None:
        registered = torch.library.custom_op(f"depthattn::{name}", function, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        if differentiate is not None:
            registered.register_autograd(differentiate, setup_context=setup_context)

    op(
        "attn_res_phase1_triton_backward",
        _phase1_backward,
        _phase1_backward_fake,
        "(Tensor[] grad_outs, Tensor[] grad_lses, Tensor[] sources, Tensor score_weights, Tensor[] lses, "
        "Tensor logits, Tensor rstd) -> (Tensor[], Tensor)",
    )
    op(
        "attn_res_phase1_triton",
        _phase1,
        _phase1_fake,
        "(Tensor[] sources, Tensor score_weights, float eps) -> (Tensor[], Tensor[], Tensor, Tensor)",
        _differentiate_phase1,
        _save_phase1,
    )
    op(
        "attn_res_phase2_triton_backward",
        lambda *flat: _phase2_backward(Phase2GradientInputs(*flat)),
        lambda *flat: _phase2_backward_fake(Phase2GradientInputs(*flat)),
        "(Tensor grad_out, Tensor? grad_total, Tensor total, Tensor seq_out, Tensor seq_lse, Tensor score_weight, "
        "Tensor? norm_weight, Tensor stats, float read_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    op(
        "attn_res_phase2_triton",
        lambda *flat: _phase2(Phase2Inputs(*flat)),
        lambda *flat: _phase2_fake(Phase2Inputs(*flat)),
        "(Tensor partial, Tensor? update, Tensor seq_out, Tensor seq_lse, Tensor score_weight, float eps, "
        "float read_scale, Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor, Tensor)",
        _differentiate_phase2,
        _save_phase2,
    )


# A second copy of this file (remote code) must use the ops of the first.
if not hasattr(torch.ops.depthattn, "attn_res_phase1_triton"):
    _register_ops()
