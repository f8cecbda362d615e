"""AttnRes read on a GPU: supported inputs, launches, and ops for `torch.compile` and autograd.

`attn_res_read_triton` computes the paper's read; `attn_res_ops` of the package adapts its `AttnResInputs` to these
arguments. `fused_attn_res_read` also does in the same pass what comes before and after a read: adding a sublayer's
output to the newest source, and an RMSNorm of the result.

Sources are passed as a tuple of pointers, so that they are not stacked or copied. A launch processes up to
MAX_SOURCES_PER_LAUNCH sources. With more, the launches of the forward pass on the running maximum, sum and
unnormalised output. In the backward, a first series of launches computes the output; its last launch also computes the
gradients of its own sources, and more launches those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_configs import MAX_CHANNELS, MAX_SOURCES_PER_LAUNCH, read_config
from .attn_res_decode import decode, is_decode
from .attn_res_inputs import ReadGradientInputs, ReadInputs
from .attn_res_read import attn_res_read_kernel
from .attn_res_read_backward import attn_res_read_backward_kernel
from .launches import architecture_of, num_programs, on_device, sum_dtype, tensor_limit

_NUM_STATS_BEFORE_LOGITS = 3


def attn_res_read_limit(sources: Sequence[Tensor], score_weight: Tensor) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do."""
    first = sources[0]
    limit = tensor_limit("sources", first)
    if limit is not None:
        return limit
    if first.shape[-1] > MAX_CHANNELS:
        return f"sources must have at most {MAX_CHANNELS} channels, got {first.shape[-1]}"
    if score_weight.device != first.device:
        return f"`score_weight` must be on the device of the sources, {first.device}, got {score_weight.device}"
    return None


def attn_res_read_triton(
    sources: Sequence[Tensor], score_weight: Tensor, *, eps: float, read_scale: float, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute `attn_res_read` (arXiv 2603.15031, Eq. 2-4) with the options of the paper; arguments as there."""
    h, _, stats = fused_attn_res_read(sources, score_weight, eps=eps, read_scale=read_scale, with_stats=return_weights)
    if not return_weights:
        return h, None
    logits = stats.narrow(1, _NUM_STATS_BEFORE_LOGITS, len(sources))
    return h, logits.softmax(-1).reshape(*h.shape[:-1], 1, len(sources))


def fused_attn_res_read(
    sources: Sequence[Tensor],
    score_weight: Tensor,
    *,
    eps: float,
    read_scale: float = 1.0,
    update: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    with_stats: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute an AttnRes read together with the addition before it and the norm after it, in one pass.

        v_last  = round(sources[-1] + update)                            with `update`
        h       = read_scale * sum_i softmax_i(logit) v_i                as in `attn_res_read`
        out     = h / sqrt(mean(h^2) + norm_eps) * norm_weight           with `norm_weight`, else h

    `round` is to the dtype of the sources, so that the read uses the same sum as later reads. `h` is not rounded
    before the norm.

    Args:
        sources: N >= 1 tensors [..., D].
        score_weight: the query times the key-norm weight, [D].
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
        update: output of the previous sublayer, [..., D], in the dtype of the sources, or None.
        norm_weight: weight of the norm, [D], or None.
        norm_eps: epsilon of the norm, added to the mean square of h.
        with_stats: return the statistics also if no gradient is needed.

    Returns:
        `out` [..., D], `v_last` [..., D] (None without `update`), and the detached statistics [tokens, 3 + 2 N] of
        `attn_res_read_kernel`, or None.
    """
    inputs = (*sources, score_weight, update, norm_weight)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs if x is not None)
    weight = score_weight.to(sum_dtype(sources[0]))
    given = ReadInputs(list(sources), weight, eps, read_scale, update, norm_weight, norm_eps)
    if not (with_stats or needs_grad):
        out, total = torch.ops.depthattn.attn_res_inference_triton(*given)
        return out, total if update is not None else None, None
    out, partial, stats = torch.ops.depthattn.attn_res_read_triton(*given)
    return out, partial if update is not None else None, stats


def _read_forward(inputs: ReadInputs) -> tuple[Tensor, Tensor, Tensor]:
    sources, score_weight, eps, read_scale, update, norm_weight, norm_eps = inputs
    first = sources[0]
    num_channels, num_sources = first.shape[-1], len(sources)
    num_tokens = first.numel() // num_channels
    rows = [source.contiguous() for source in sources]
    out = torch.empty_like(rows[0])
    partial = torch.empty_like(out) if update is not None else out.new_empty(0)
    stats = score_weight.new_empty(num_tokens, _NUM_STATS_BEFORE_LOGITS + 2 * num_sources)
    update = update.contiguous() if update is not None else None
    groups = _groups(num_sources)
    carry = score_weight.new_empty(num_tokens, num_channels) if len(groups) > 1 else None
    score_weight = score_weight.contiguous()
    norm_weight = norm_weight.contiguous() if norm_weight is not None else None
    if num_tokens == 0:
        return out, partial, stats
    with on_device(first):
        for group in groups:
            config = read_config("forward", architecture_of(first.device), num_channels, len(group))
            is_last = group.stop == num_sources
            attn_res_read_kernel[(-(-num_tokens // config.block_t),)](
                tuple(rows[group.start : group.stop]),
                update if is_last else None,
                score_weight,
                norm_weight if is_last else None,
                carry,
                out if is_last else None,
                partial if is_last and update is not None else None,
                stats,
                read_scale,
                num_tokens,
                num_sources,
                group.start,
                EPS=eps,
                NORM_EPS=norm_eps,
                IS_FIRST=group.start == 0,
                IS_LAST=is_last,
                **config.launch_options(num_channels),
            )
    return out, partial, stats


def _read_inference(inputs: ReadInputs) -> tuple[Tensor, Tensor]:
    """Read without statistics. The op itself chooses the kernel, so that compiled graphs do not depend on lengths."""
    return decode(inputs) if is_decode(inputs.sources) else _read_forward(inputs)[:2]


def read_backward(
    inputs: ReadGradientInputs, coefficients: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the gradients of the sources that need one, in order, of the score weight and of the norm's weight.

    Args:
        inputs: the inputs. The last source is `v_last`; its gradient, which is also that of the update, includes
            `grad_partial`.
        coefficients: output, [3, N, tokens], for a, b and c of `attn_res_pull`, or None.
    """
    grad_out, grad_partial, sources, score_weight, stats, read_scale, norm_weight, needs_grad = inputs
    first = sources[0]
    num_channels, num_sources = first.shape[-1], len(sources)
    num_tokens = first.numel() // num_channels
    rows = [source.contiguous() for source in sources]
    grads = [torch.empty_like(row) if needed else row for row, needed in zip(rows, needs_grad, strict=True)]
    needed_grads = [grad for grad, needed in zip(grads, needs_grad, strict=True) if needed]
    if num_tokens == 0:
        empty = score_weight.new_zeros(0 if norm_weight is None else num_channels)
        return needed_grads, torch.zeros_like(score_weight), empty
    grad_out = grad_out.contiguous()
    grad_partial = grad_partial.contiguous() if grad_partial is not None else None
    score_weight = score_weight.contiguous()
    norm_weight = norm_weight.contiguous() if norm_weight is not None else None
    groups = _groups(num_sources)
    carry = delta = None
    if len(groups) > 1:
        carry, delta = score_weight.new_empty(num_tokens, num_channels), score_weight.new_empty(num_tokens)
    most_sources = max(map(len, groups))
    widest = read_config("backward", architecture_of(first.device), num_channels, most_sources)
    grid = min(num_programs(first.device, widest.programs_per_sm), num_tokens)
    # One row per program and launch, summed in this order.
    grad_weight = score_weight.new_empty(len(groups), grid, num_channels)
    grad_norm_weight = score_weight.new_zeros(0 if norm_weight is None else grid, num_channels)

    def launch(group: range, mix_from: str, mix_to: str) -> None:
        config = read_config("backward", architecture_of(first.device), num_channels, len(group))
        is_last, forms_grads = group.stop == num_sources, mix_to == "grads"
        finishes_mix = forms_grads and mix_from != "done"
        attn_res_read_backward_kernel[(grid,)](
            tuple(rows[group.start : group.stop]),
            tuple(grads[group.start : group.stop]),
            grad_out if finishes_mix else None,
            grad_partial if is_last else None,
            score_weight,
            norm_weight if finishes_mix else None,
            stats,
            carry,
            delta,
            grad_weight[group.start // MAX_SOURCES_PER_LAUNCH] if forms_grads else None,
            grad_norm_weight if finishes_mix and norm_weight is not None else None,
            coefficients if forms_grads else None,
            read_scale,
            num_tokens,
            num_sources,
            group.start,
            NEEDS_GRAD=sum(needed << i for i, needed in enumerate(needs_grad[group.start : group.stop])),
            MIX_FROM=mix_from,
            MIX_TO=mix_to,
            **config.launch_options(num_channels),
        )

    with on_device(first):
        for group in groups[:-1]:
            launch(group, "zero" if group.start == 0 else "carry", "carry")
        launch(groups[-1], "zero" if len(groups) == 1 else "carry", "grads")
        for group in groups[:-1]:
            launch(group, "done", "grads")
    norm_grad = score_weight.new_empty(0) if norm_weight is None else grad_norm_weight.sum(0)
    return needed_grads, grad_weight.flatten(0, 1).sum(0), norm_grad


def _groups(num_sources: int) -> list[range]:
    """Return the sources of each launch; all launches but the last are full, to limit the number of binaries."""
    size = MAX_SOURCES_PER_LAUNCH
    return [range(start, min(start + size, num_sources)) for start in range(0, num_sources, size)]


def _read_forward_fake(inputs: ReadInputs) -> tuple[Tensor, Tensor, Tensor]:
    first = inputs.sources[0]
    out = first.new_empty(first.shape)
    partial = first.new_empty(first.shape) if inputs.update is not None else first.new_empty(0)
    num_tokens = math.prod(first.shape[:-1])
    num_stats = _NUM_STATS_BEFORE_LOGITS + 2 * len(inputs.sources)
    return out, partial, inputs.score_weight.new_empty(num_tokens, num_stats)


def _read_inference_fake(inputs: ReadInputs) -> tuple[Tensor, Tensor]:
    return _read_forward_fake(inputs)[:2]


def _read_backward_fake(inputs: ReadGradientInputs) -> tuple[list[Tensor], Tensor, Tensor]:
    of_sources = zip(inputs.sources, inputs.needs_grad, strict=True)
    grads = [source.new_empty(source.shape) for source, needed in of_sources if needed]
    score_weight = inputs.score_weight
    norm_grad = score_weight.new_empty(0 if inputs.norm_weight is None else score_weight.shape[0])
    return grads, torch.empty_like(score_weight), norm_grad


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    sources, score_weight, _, ctx.read_scale, update, norm_weight, _ = inputs
    _, partial, stats = output
    # Without an update, `partial` is empty.
    ctx.mark_non_differentiable(stats, *(() if update is not None else (partial,)))
    ctx.set_materialize_grads(False)
    ctx.has_update, ctx.has_norm = update is not None, norm_weight is not None
    read = [*sources[:-1], partial] if update is not None else sources
    ctx.save_for_backward(score_weight, stats, *([norm_weight] if norm_weight is not None else []), *read)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_partial: Tensor | None, *_: object) -> tuple:
    score_weight, stats, *sources = ctx.saved_tensors
    norm_weight = sources.pop(0) if ctx.has_norm else None
    of_sources, of_weight, _, _, of_update, of_norm, _ = ctx.needs_input_grad
    needs_grad = [*of_sources[:-1], of_sources[-1] or of_update]
    if grad_out is None:
        grad_out = torch.zeros_like(sources[0])
    if not ctx.has_update:
        grad_partial = None
    grads, grad_weight, grad_norm_weight = torch.ops.depthattn.attn_res_read_triton_backward(
        grad_out, grad_partial, sources, score_weight, stats, ctx.read_scale, norm_weight, needs_grad
    )
    remaining = iter(grads)
    grads = [next(remaining) if needed else None for needed in needs_grad]
    grad_update = grads[-1] if of_update else None
    if not of_sources[-1]:
        grads[-1] = None
    if of_norm:
        grad_norm_weight = grad_norm_weight.to(norm_weight.dtype)
    return (
        grads,
        grad_weight if of_weight else None,
        None,
        None,
        grad_update,
        grad_norm_weight if of_norm else None,
        None,
    )


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::attn_res_read_triton_backward",
        lambda *flat: read_backward(ReadGradientInputs(*flat)),
        mutates_args=(),
        schema="(Tensor grad_out, Tensor? grad_partial, Tensor[] sources, Tensor score_weight, Tensor stats, "
        "float read_scale, Tensor? norm_weight, bool[] needs_grad) -> (Tensor[], Tensor, Tensor)",
    )
    backward.register_fake(lambda *flat: _read_backward_fake(ReadGradientInputs(*flat)))
    inference = torch.library.custom_op(
        "depthattn::attn_res_inference_triton",
        lambda *flat: _read_inference(ReadInputs(*flat)),
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale, Tensor? update, "
        "Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor)",
    )
    inference.register_fake(lambda *flat: _read_inference_fake(ReadInputs(*flat)))
    forward = torch.library.custom_op(
        "depthattn::attn_res_read_triton",
        lambda *flat: _read_forward(ReadInputs(*flat)),
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale, Tensor? update, "
        "Tensor? norm_weight, float norm_eps) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda *flat: _read_forward_fake(ReadInputs(*flat)))
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A second copy of this file (remote code) must use the ops of the first.
if not hasattr(torch.ops.depthattn, "attn_res_read_triton"):
    _register_ops()
