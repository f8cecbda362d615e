"""AttnRes read on a GPU: supported inputs, launches, and ops for `torch.compile` and autograd.

`attn_res_read_triton` computes the paper's read; `attn_res_ops` of the package adapts its `AttnResInputs` to these
arguments.

Sources are passed as a tuple of pointers, so that they are not stacked or copied. A launch processes up to
`most_sources` of them. With more, the launches of the forward pass on the running maximum, sum and
unnormalised output. In the backward, a first series of launches computes the output; its last launch also computes the
gradients of its own sources, and more launches those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attn_res_configs import MAX_CHANNELS, MAX_SOURCES_PER_LAUNCH, most_sources, read_config
from .attn_res_decode import decode, is_decode
from .attn_res_inputs import Prior, PriorGradients, ReadGradientInputs, ReadInputs
from .attn_res_read import attn_res_read_kernel
from .attn_res_read_backward import attn_res_read_backward_kernel
from .launches import architecture_of, num_programs, on_device, sum_dtype, tensor_limit

_NUM_STATS_BEFORE_LOGITS = 2


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
    sources: Sequence[Tensor],
    score_weight: Tensor,
    *,
    eps: float,
    read_scale: float = 1.0,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the AttnRes read of the paper (arXiv 2603.15031, Eq. 2-4) in one pass over the sources.

        h = read_scale * sum_i softmax_i(w . v_i / sqrt(mean(v_i^2) + eps)) v_i

    Args:
        sources: N >= 1 tensors [..., D].
        score_weight: the query times the key-norm weight, [D].
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
        return_weights: return the weights of the sources.

    Returns:
        h [..., D], and the detached weights [..., 1, N] or None.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*sources, score_weight))
    given = ReadInputs(list(sources), score_weight.to(sum_dtype(sources[0])), eps, read_scale)
    if not (return_weights or needs_grad):
        return torch.ops.depthattn.attn_res_plain_inference_triton(*given), None
    h, stats = torch.ops.depthattn.attn_res_plain_read_triton(*given)
    if not return_weights:
        return h, None
    logits = stats.narrow(1, _NUM_STATS_BEFORE_LOGITS, len(sources))
    return h, logits.softmax(-1).reshape(*h.shape[:-1], 1, len(sources))


def read_forward(
    inputs: ReadInputs, prior: Prior | None = None, update: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, its statistics, and the last source with the update added."""
    sources, score_weight, eps, read_scale = inputs
    first = sources[0]
    num_channels, num_sources = first.shape[-1], len(sources)
    num_tokens = first.numel() // num_channels
    rows = [source.contiguous() for source in sources]
    out = torch.empty_like(rows[0])
    newest = rows[-1] if update is None else torch.empty_like(rows[-1])
    stats = score_weight.new_empty(num_tokens, _NUM_STATS_BEFORE_LOGITS + 2 * num_sources)
    groups = _groups(num_sources, most_sources(num_channels, update is not None))
    carry = score_weight.new_empty(num_tokens, num_channels) if len(groups) > 1 else None
    score_weight = score_weight.contiguous()
    if num_tokens == 0:
        return out, stats, newest
    prior_out, prior_lse = (None, None) if prior is None else (prior.out.contiguous(), prior.lse.contiguous())
    update = None if update is None else update.contiguous()
    direction = "forward" if prior is None and update is None else "joined"
    with on_device(first):
        for group in groups:
            config = read_config(direction, architecture_of(first.device), num_channels, len(group))
            is_first, is_last = group.start == 0, group.stop == num_sources
            attn_res_read_kernel[(-(-num_tokens // config.block_t),)](
                tuple(rows[group.start : group.stop]),
                score_weight,
                carry,
                out if is_last else None,
                stats,
                read_scale,
                num_tokens,
                num_sources,
                group.start,
                EPS=eps,
                IS_FIRST=is_first,
                IS_LAST=is_last,
                prior_ptr=prior_out if is_first else None,
                prior_lse_ptr=prior_lse if is_first else None,
                update_ptr=update if is_last else None,
                newest_ptr=newest if is_last and update is not None else None,
                **config.launch_options(num_channels),
            )
    return out, stats, newest


def _op_read(inputs: ReadInputs) -> tuple[Tensor, Tensor]:
    h, stats, _ = read_forward(inputs)
    return h, stats


def _read_inference(inputs: ReadInputs) -> Tensor:
    """Read without statistics. The op itself chooses the kernel, so that compiled graphs do not depend on lengths."""
    return decode(inputs) if is_decode(inputs.sources) else read_forward(inputs)[0]


def read_backward(
    inputs: ReadGradientInputs,
    prior: PriorGradients | None = None,
    passed: Sequence[Tensor | None] = (),
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources that need one, in order, and of the score weight.

    Args:
        inputs: the inputs.
        prior: inputs and outputs for the prior, or None for a read without one.
        passed: gradients of the sources from later uses, N tensors [..., D] or None, to be added; empty for none.
    """
    grad_out, sources, score_weight, stats, read_scale, needs_grad = inputs
    first = sources[0]
    num_channels, num_sources = first.shape[-1], len(sources)
    num_tokens = first.numel() // num_channels
    rows = [source.contiguous() for source in sources]
    grads = [torch.empty_like(row) if needed else row for row, needed in zip(rows, needs_grad, strict=True)]
    needed_grads = [grad for grad, needed in zip(grads, needs_grad, strict=True) if needed]
    if num_tokens == 0:
        return needed_grads, torch.zeros_like(score_weight)
    grad_out = grad_out.contiguous()
    score_weight = score_weight.contiguous()
    passed = [None if grad is None else grad.contiguous() for grad in passed or [None] * num_sources]
    is_complex = prior is not None or any(grad is not None for grad in passed) or num_sources > MAX_SOURCES_PER_LAUNCH
    size = most_sources(num_channels, is_complex)
    kept = None if prior is None else prior.kept.contiguous()
    lse = None if prior is None else prior.lse.contiguous()
    keeps_read = prior is not None and prior.keeps_read
    groups = _groups(num_sources, size)
    carry = delta = None
    if len(groups) > 1 and not keeps_read:
        carry, delta = score_weight.new_empty(num_tokens, num_channels), score_weight.new_empty(num_tokens)
    widest = read_config("backward", architecture_of(first.device), num_channels, max(map(len, groups)))
    grid = min(num_programs(first.device, widest.programs_per_sm), num_tokens)
    # One row per program and launch, summed in this order.
    grad_weight = score_weight.new_empty(len(groups), grid, num_channels)

    def launch(group: range, mix_from: str, mix_to: str) -> None:
        config = read_config("backward", architecture_of(first.device), num_channels, len(group))
        part = slice(group.start, group.stop)
        forms_grads = mix_to == "grads"
        finishes_mix = forms_grads and mix_from != "done"
        loads_prior = prior is not None and not keeps_read and (mix_from == "zero" or finishes_mix)
        forms_prior = prior is not None and finishes_mix and group is groups[-1]
        has_passed = _bits([grad is not None for grad in passed[part]]) if forms_grads else 0
        attn_res_read_backward_kernel[(grid,)](
            tuple(rows[part]),
            tuple(grads[part]),
            grad_out if finishes_mix else None,
            score_weight,
            stats,
            carry,
            delta,
            grad_weight[group.start // size] if forms_grads else None,
            read_scale,
            num_tokens,
            num_sources,
            group.start,
            NEEDS_GRAD=_bits(needs_grad[part]),
            MIX_FROM=mix_from,
            MIX_TO=mix_to,
            prior_ptr=kept if loads_prior else None,
            prior_lse_ptr=lse if loads_prior or forms_prior else None,
            read_ptr=kept if keeps_read else None,
            grad_prior_ptr=prior.grad_out if prior is not None and forms_prior else None,
            grad_prior_lse_ptr=prior.grad_lse if prior is not None and finishes_mix else None,
            passed_ptrs=_filled(passed[part], rows[part]) if has_passed else None,
            HAS_PASSED=has_passed,
            **config.launch_options(num_channels),
        )

    with on_device(first):
        if keeps_read:
            for group in reversed(groups):
                launch(group, "read", "grads")
        else:
            for group in groups[:-1]:
                launch(group, "zero" if group.start == 0 else "carry", "carry")
            launch(groups[-1], "zero" if len(groups) == 1 else "carry", "grads")
            for group in groups[:-1]:
                launch(group, "done", "grads")
    return needed_grads, grad_weight.flatten(0, 1).sum(0)


def _bits(flags: Sequence[bool]) -> int:
    """Return a number of which bit i is flag i."""
    return sum(flag << i for i, flag in enumerate(flags))


def _filled(tensors: Sequence[Tensor | None], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors, with one of `others` in place of None, so that all are pointers in a launch."""
    return tuple(other if tensor is None else tensor for tensor, other in zip(tensors, others, strict=True))


def _groups(num_sources: int, size: int) -> list[range]:
    """Return the sources of each launch; all launches but the last are full, to limit the number of binaries."""
    return [range(start, min(start + size, num_sources)) for start in range(0, num_sources, size)]


def _read_forward_fake(inputs: ReadInputs) -> tuple[Tensor, Tensor]:
    first = inputs.sources[0]
    out = first.new_empty(first.shape)
    num_tokens = math.prod(first.shape[:-1])
    num_stats = _NUM_STATS_BEFORE_LOGITS + 2 * len(inputs.sources)
    return out, inputs.score_weight.new_empty(num_tokens, num_stats)


def _read_inference_fake(inputs: ReadInputs) -> Tensor:
    return _read_forward_fake(inputs)[0]


def _read_backward_fake(inputs: ReadGradientInputs) -> tuple[list[Tensor], Tensor]:
    of_sources = zip(inputs.sources, inputs.needs_grad, strict=True)
    grads = [source.new_empty(source.shape) for source, needed in of_sources if needed]
    return grads, torch.empty_like(inputs.score_weight)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    sources, score_weight, _, ctx.read_scale = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(score_weight, stats, *sources)


def _differentiate(ctx: Any, grad_out: Tensor | None, *_: object) -> tuple:
    score_weight, stats, *sources = ctx.saved_tensors
    needs_grad, of_weight, *_ = ctx.needs_input_grad
    if grad_out is None:
        grad_out = torch.zeros_like(sources[0])
    grads, grad_weight = torch.ops.depthattn.attn_res_plain_read_triton_backward(
        grad_out, sources, score_weight, stats, ctx.read_scale, needs_grad
    )
    remaining = iter(grads)
    grads = [next(remaining) if needed else None for needed in needs_grad]
    return grads, grad_weight if of_weight else None, None, None


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::attn_res_plain_read_triton_backward",
        lambda *flat: read_backward(ReadGradientInputs(*flat)),
        mutates_args=(),
        schema="(Tensor grad_out, Tensor[] sources, Tensor score_weight, Tensor stats, float read_scale, "
        "bool[] needs_grad) -> (Tensor[], Tensor)",
    )
    backward.register_fake(lambda *flat: _read_backward_fake(ReadGradientInputs(*flat)))
    inference = torch.library.custom_op(
        "depthattn::attn_res_plain_inference_triton",
        lambda *flat: _read_inference(ReadInputs(*flat)),
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale) -> Tensor",
    )
    inference.register_fake(lambda *flat: _read_inference_fake(ReadInputs(*flat)))
    forward = torch.library.custom_op(
        "depthattn::attn_res_plain_read_triton",
        lambda *flat: _op_read(ReadInputs(*flat)),
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale) -> (Tensor, Tensor)",
    )
    forward.register_fake(lambda *flat: _read_forward_fake(ReadInputs(*flat)))
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A second copy of this file (remote code) must use the ops of the first. Copies saved by older versions have ops of
# other names, `attn_res_read_triton`, with inputs for an addition and a norm.
if not hasattr(torch.ops.depthattn, "attn_res_plain_read_triton"):
    _register_ops()
