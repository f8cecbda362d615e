r"""Phase 2 of grouped AttnRes reads in torch, forward and backward without autograd (`attn_res_phase2_ops`).

The usual read of phase 2 has one source v beside o of phase 1. With x the logit of v and gate = sigmoid(x - lse):

    h         = scale (gate v + (1 - gate) o)
    dL/dx     = scale gate (1 - gate) g . (v - o) = scale gate g . (v - h / scale),   g = dL/dh
    dL/do     = scale (1 - gate) g,   dL/dlse = -dL/dx
    dL/dv     = scale gate g + dL/dx (r w - x r^2 v / D)

With several sources, gate is a softmax p over lse and the logits, and dL/dx_j = p_j (scale g . v_j - g . h).
Products with a vector have `out=` or are in place, which autocast leaves in their dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.attn_res_group_inputs import (
    Phase2GradientInputs,
    Phase2Gradients,
    Phase2Impl,
    Phase2Inputs,
    Phase2Result,
)

# Number of elements of one source that are read at a time; see `attn_res_ops`.
_CHUNK_ELEMENTS = 1 << 17
# Up to this number of elements, the sources of a chunk are gathered into one tensor: the number of torch calls, a few
# microseconds each, then matters more than memory traffic.
_GATHERED_ELEMENTS = 1 << 18
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 24


def _forward(inputs: Phase2Inputs) -> Phase2Result:
    sources, score_weight, eps, read_scale, update, prior_out, prior_lse = inputs
    newest = sources[-1] if update is None else sources[-1] + update
    dtype = torch.promote_types(newest.dtype, torch.float32)
    weight = score_weight.to(dtype)
    if prior_out is not None and prior_lse is not None and len(sources) == 1:
        h, stats = _merge(newest, prior_out, prior_lse, weight, eps, read_scale)
    else:
        h, stats = _read((*sources[:-1], newest), prior_out, prior_lse, weight, eps, read_scale)
    return Phase2Result(h, newest, stats)


def _backward(inputs: Phase2GradientInputs) -> Phase2Gradients:
    if inputs.has_prior and len(inputs.sources) == 1:
        return _merge_backward(inputs)
    return _read_backward(inputs)


# One source and a read of phase 1. Statistics are [..., 1].


def _merge(
    source: Tensor, prior_out: Tensor, prior_lse: Tensor, weight: Tensor, eps: float, read_scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    dtype, num_channels = weight.dtype, weight.shape[0]
    is_direct = source.dtype == dtype
    value, prior = (source, prior_out) if is_direct else (source.to(dtype), prior_out.to(dtype))
    r = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    r = torch.full_like(r, eps).addcmul_(r, r, value=1 / num_channels).rsqrt_()
    x = torch.mv(value.reshape(-1, num_channels), weight, out=torch.empty_like(prior_lse)).view_as(r).mul_(r)
    gate = (x - prior_lse.view_as(r)).sigmoid_()
    h = torch.lerp(prior, value, gate)
    if read_scale != 1:
        h *= read_scale
    return h if is_direct else h.to(source.dtype), (gate, x, r)


def _merge_backward(inputs: Phase2GradientInputs) -> Phase2Gradients:
    grad, (passed,), (source,), weight, read_scale, (gate, x, r), kept, keeps_read, _, needs_weight = inputs
    assert kept is not None
    dtype, num_channels = weight.dtype, weight.shape[0]
    is_direct, value = source.dtype == dtype, source
    if not is_direct:
        grad, value, kept = grad.to(dtype), source.to(dtype), kept.to(dtype)
        passed = None if passed is None else passed.to(dtype)
    if read_scale != 1:
        grad = grad * read_scale
        scratch = torch.sub(value, kept, alpha=1 / read_scale if keeps_read else 1)
    else:
        scratch = torch.sub(value, kept)
    grad_x = scratch.mul_(grad).sum(-1, keepdim=True).mul_(gate)
    if not keeps_read:
        grad_x.mul_(1 - gate)
    b = grad_x * r
    c = (b * x).mul_(r)
    grad_prior = torch.addcmul(grad, grad, gate, value=-1)
    if passed is None:
        total = torch.mul(grad, gate, out=scratch)
    else:
        total = torch.addcmul(passed, grad, gate, out=scratch)
    total.addcmul_(value, c, value=-1 / num_channels).addcmul_(b, weight)
    grad_weight = None
    if needs_weight:
        grad_weight = torch.mv(value.reshape(-1, num_channels).t(), b.view(-1), out=torch.empty_like(weight))
    if not is_direct:
        total, grad_prior = total.to(source.dtype), grad_prior.to(source.dtype)
    return Phase2Gradients([total], grad_prior, grad_x.neg_().view(-1), grad_weight)


# Any number of sources, with or without a read of phase 1. Statistics are [sources, tokens].


def _read(
    sources: Sequence[Tensor],
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
    weight: Tensor,
    eps: float,
    read_scale: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    first, num_channels = sources[0], weight.shape[0]
    rows = [source.reshape(-1, num_channels) for source in sources]
    if prior_out is not None:
        rows.insert(0, prior_out.reshape(-1, num_channels))
    h = torch.empty_like(rows[-1], memory_format=torch.contiguous_format)
    size = _chunk_size(h)
    if h.shape[0] <= size:
        p, x, r = _read_chunk(rows, prior_lse, weight, eps, read_scale, h)
    else:
        lses = [None] * len(h.split(size)) if prior_lse is None else prior_lse.split(size)
        pieces = zip(*(row.split(size) for row in rows), strict=True)
        parts = [
            _read_chunk(values, lse, weight, eps, read_scale, out)
            for values, lse, out in zip(pieces, lses, h.split(size), strict=True)
        ]
        p, x, r = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return h.view(first.shape), (p, x, r)


def _read_chunk(
    rows: Sequence[Tensor], prior_lse: Tensor | None, weight: Tensor, eps: float, read_scale: float, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the read of rows [n, D], the first of which is o if `prior_lse` is given, to `h`; return statistics."""
    dtype, (num_tokens, num_channels) = weight.dtype, h.shape
    is_direct, has_prior = h.dtype == dtype, prior_lse is not None
    values = list(rows) if is_direct else [row.to(dtype) for row in rows]
    num_sources = len(values) - has_prior
    logits = weight.new_empty(len(values), num_tokens)
    x = logits
    if prior_lse is not None:
        logits[0] = prior_lse
        x = logits[1:]
    r = weight.new_empty(num_sources, num_tokens)
    if num_sources * h.numel() <= _GATHERED_ELEMENTS:
        gathered = torch.cat(values[has_prior:])
        torch.mv(gathered, weight, out=x.view(-1))
        torch.linalg.vector_norm(gathered, dim=-1, out=r.view(-1))
    else:
        for value, dot, norm in zip(values[has_prior:], x, r, strict=True):
            torch.mv(value, weight, out=dot)
            torch.linalg.vector_norm(value, dim=-1, out=norm)
    r = torch.full_like(r, eps).addcmul_(r, r, value=1 / num_channels).rsqrt_()
    x.mul_(r)
    p = logits.softmax(0)
    columns = (p if read_scale == 1 else p * read_scale).unsqueeze(-1).unbind(0)
    mixed = torch.mul(values[0], columns[0], out=h if is_direct else None)
    for value, column in zip(values[1:], columns[1:], strict=True):
        mixed.addcmul_(value, column)
    if not is_direct:
        h.copy_(mixed)
    return p, x, r


def _read_backward(inputs: Phase2GradientInputs) -> Phase2Gradients:
    sources, weight, stats = inputs.sources, inputs.score_weight, inputs.stats
    first, num_channels = sources[0], weight.shape[0]
    rows = [source.reshape(-1, num_channels) for source in sources]
    num_tokens = rows[0].shape[0]
    gradients = first.new_empty(len(rows), num_tokens, num_channels)
    passed = [None if grad is None else grad.reshape(-1, num_channels) for grad in inputs.passed]
    grad_prior, grad_lse, kept = None, None, inputs.kept
    if inputs.has_prior:
        grad_prior, grad_lse = first.new_empty(num_tokens, num_channels), weight.new_empty(num_tokens)
    grad_weight = torch.zeros_like(weight) if inputs.needs_weight else None
    kept = None if kept is None else kept.reshape(-1, num_channels)
    per_token = (inputs.grad_h.reshape(-1, num_channels), kept, grad_prior, grad_lse)
    size = _chunk_size(first)
    if num_tokens <= size:
        _read_backward_chunk(inputs, per_token, stats, rows, passed, gradients, grad_weight)
    else:
        for chunk in (slice(start, start + size) for start in range(0, num_tokens, size)):
            _read_backward_chunk(
                inputs,
                [None if x is None else x[chunk] for x in per_token],
                [stat[:, chunk] for stat in stats],
                [row[chunk] for row in rows],
                [None if row is None else row[chunk] for row in passed],
                gradients[:, chunk],
                grad_weight,
            )
    if grad_prior is not None:
        grad_prior = grad_prior.view(first.shape)
    return Phase2Gradients(gradients.view(len(rows), *first.shape).unbind(0), grad_prior, grad_lse, grad_weight)


def _read_backward_chunk(
    inputs: Phase2GradientInputs,
    per_token: Sequence[Tensor | None],
    stats: Sequence[Tensor],
    rows: Sequence[Tensor],
    passed: Sequence[Tensor | None],
    gradients: Tensor,
    grad_weight: Tensor | None,
) -> None:
    """Write to `gradients` [R, n, D] and to the last two of `per_token`; add to `grad_weight`."""
    grad, kept, grad_prior, grad_lse = per_token
    assert grad is not None
    p, x, r = stats
    weight, read_scale = inputs.score_weight, inputs.read_scale
    dtype, num_channels = weight.dtype, weight.shape[0]
    is_direct = grad.dtype == dtype
    grad = grad.to(dtype)
    scratch = torch.empty_like(grad)
    kept_dot = None if kept is None else torch.mul(kept, grad, out=scratch).sum(-1)
    is_gathered = gradients.numel() <= _GATHERED_ELEMENTS
    if is_gathered:
        flat_values = torch.cat(list(rows)).to(dtype)
        gathered = flat_values.view(gradients.shape)  # [R, n, D]
        products = torch.mul(gathered, grad, out=gradients if is_direct else None)
        dots = products.sum(-1)  # [R, n]
    else:
        values = rows if is_direct else [row.to(dtype) for row in rows]
        dots = torch.empty_like(r)
        for value, dot in zip(values, dots, strict=True):
            torch.sum(torch.mul(value, grad, out=scratch), -1, out=dot)
    a, p_sources = p, p[1:] if inputs.has_prior else p
    if read_scale != 1:
        a = p * read_scale
        dots.mul_(read_scale)
    # g . h, from h or from the sources and o.
    if kept_dot is None or not inputs.keeps_read:
        delta = (p_sources * dots).sum(0)
        if kept_dot is not None:
            delta.addcmul_(kept_dot, a[0])
    else:
        delta = kept_dot
    grad_x = dots.sub_(delta).mul_(p_sources)
    b = grad_x * r
    to_grad, to_weight, to_value = a.unsqueeze(-1), b.unsqueeze(-1), (b * x).mul_(r).unsqueeze(-1)
    if grad_prior is not None and grad_lse is not None:
        torch.sum(grad_x, 0, out=grad_lse).neg_()
        product = torch.mul(grad, to_grad[0], out=grad_prior if is_direct else scratch)
        if not is_direct:
            grad_prior.copy_(product)
        to_grad = to_grad[1:]
    if is_gathered:
        total = torch.mul(to_grad, grad, out=products)
        total.addcmul_(gathered, to_value, value=-1 / num_channels).addcmul_(to_weight, weight)
        for of_source, later in zip(total, passed, strict=True):
            if later is not None:
                of_source += later
        if not is_direct:
            gradients.copy_(total)
        if grad_weight is not None:
            grad_weight.addmv_(flat_values.t(), b.view(-1))
        return
    for i, (value, later) in enumerate(zip(values, passed, strict=True)):
        total = gradients[i] if is_direct else scratch
        if later is None:
            torch.mul(grad, to_grad[i], out=total)
        else:
            torch.addcmul(later.to(dtype), grad, to_grad[i], out=total)
        total.addcmul_(value, to_value[i], value=-1 / num_channels).addcmul_(to_weight[i], weight)
        if not is_direct:
            gradients[i] = total
        if grad_weight is not None:
            grad_weight.addmv_(value.t(), b[i])


def _chunk_size(like: Tensor) -> int:
    num_elements = _CHUNK_ELEMENTS if like.device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
    return max(1, num_elements // like.shape[-1])


PHASE2_TORCH = Phase2Impl(_forward, _backward)
