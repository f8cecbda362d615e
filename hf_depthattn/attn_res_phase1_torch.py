r"""Phase 1 of grouped AttnRes reads in torch, forward and backward without autograd (`attn_res_phase1_ops`).

There are two forms of both. One gathers the sources of some tokens into one tensor: all reads of all sources are then
one batched product with a small matrix for each token. The other takes one source after the other, which makes no copy
of them. The forward gathers small tensors, for which the number of calls matters, and the backward whenever there are
more than two reads, for which its batched products are faster.

The backward is, with g_s = dL/do_s:

    p_si    = exp(x_si - lse_s)
    delta_s = sum_i p_si g_s . v_i - dL/dlse_s
    b_si    = p_si (g_s . v_i - delta_s) r_i
    dL/dv_i = sum_s (p_si g_s + b_si w_s) - (sum_s b_si x_si) r_i v_i / D
    dL/dw_s = sum over tokens and i of b_si v_i

Products have `out=` or are in place, which autocast leaves in their dtype.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .kernels.attn_res_group_inputs import Phase1GradientInputs, Phase1Impl, Phase1Inputs, Phase1Result

# Number of elements of all gathered tensors of a chunk, and of one source. On a CPU, a chunk should stay in cache.
_CHUNK_ELEMENTS = 1 << 19
_SOURCE_CHUNK_ELEMENTS = 1 << 18
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 26
# Up to this number of elements of all sources and results, the forward gathers them.
_GATHERED_ELEMENTS = 1 << 20
# Up to this number of reads, the backward takes one source after the other.
_FEW_READS = 2


def _forward(inputs: Phase1Inputs) -> Phase1Result:
    sources, score_weights, eps = inputs
    weights = score_weights.to(torch.promote_types(sources[0].dtype, torch.float32))
    is_small = (len(sources) + len(weights)) * sources[0].numel() <= _GATHERED_ELEMENTS
    return (_forward_gathered if is_small else _forward_one_by_one)(sources, weights, eps)


def _forward_gathered(sources: Sequence[Tensor], weights: Tensor, eps: float) -> Phase1Result:
    first, num_sources, (num_reads, num_channels) = sources[0], len(sources), weights.shape
    values = torch.cat([source.reshape(-1, num_channels) for source in sources]).to(weights.dtype)  # [N tokens, D]
    r = torch.linalg.vector_norm(values, dim=-1)
    r = torch.full_like(r, eps).addcmul_(r, r, value=1 / num_channels).rsqrt_().view(num_sources, -1)
    num_tokens = r.shape[1]
    x = torch.mm(weights, values.t(), out=weights.new_empty(num_reads, values.shape[0]))
    x = x.view(num_reads, num_sources, num_tokens).mul_(r)
    log_shares = x.log_softmax(1)
    lse = x[:, 0] - log_shares[:, 0]
    shares = log_shares.exp_().permute(2, 0, 1).contiguous()  # [tokens, S, N]
    # The reads of a token are neighbours, since the product is several times slower otherwise.
    mixed = weights.new_empty(num_tokens, num_reads, num_channels)
    torch.bmm(shares, values.view(num_sources, num_tokens, num_channels).transpose(0, 1), out=mixed)
    outs = mixed.view(*first.shape[:-1], num_reads, num_channels).unbind(-2)
    if first.dtype != weights.dtype:
        outs = tuple(torch.empty_like(first).copy_(out) for out in outs)
    return Phase1Result(outs, lse, x.transpose(0, 1), r)


def _forward_one_by_one(sources: Sequence[Tensor], weights: Tensor, eps: float) -> Phase1Result:
    first, num_sources, (num_reads, num_channels) = sources[0], len(sources), weights.shape
    rows = [source.reshape(-1, num_channels) for source in sources]
    num_tokens = rows[0].shape[0]
    logits = weights.new_empty(num_sources, num_reads, num_tokens)
    rstd = weights.new_empty(num_sources, num_tokens)
    lse = weights.new_empty(num_reads, num_tokens)
    # In tensors of their own, since phase 2 keeps all but the first for its backward in 16 bits.
    outs = [first.new_empty(first.shape) for _ in range(num_reads)]
    out_rows = [out.view(num_tokens, num_channels) for out in outs]
    for chunk in _chunks(first, num_channels, _SOURCE_CHUNK_ELEMENTS):
        values = [row[chunk].to(weights.dtype) for row in rows]
        x, r = logits[..., chunk], rstd[:, chunk]
        for value, of_source, norm in zip(values, x.unbind(0), r.unbind(0), strict=True):
            # The norm first: it streams the source into the cache, from which the product is twice as fast.
            torch.linalg.vector_norm(value, dim=-1, out=norm)
            torch.mm(weights, value.t(), out=of_source)
        r.square_().div_(num_channels).add_(eps).rsqrt_()
        x.mul_(r.unsqueeze(1))
        # Over the first axis, since a softmax over another one but the last is several times slower.
        log_shares = x.log_softmax(0)
        torch.sub(x[0], log_shares[0], out=lse[:, chunk])
        columns = log_shares.exp_().unsqueeze(-1).unbind(0)
        mixed = torch.mul(values[0], columns[0])  # [S, n, D]
        for value, column in zip(values[1:], columns[1:], strict=True):
            mixed.addcmul_(value, column)
        for row, of_read in zip(out_rows, mixed, strict=True):
            row[chunk] = of_read
    return Phase1Result(outs, lse, logits, rstd)


def _backward(inputs: Phase1GradientInputs) -> tuple[Sequence[Tensor], Tensor | None]:
    first, passed = inputs.sources[0], inputs.passed
    rows = [source.reshape(-1, first.shape[-1]) for source in inputs.sources]
    grad_rows = [torch.zeros_like(rows[0]) if g is None else g.reshape(rows[0].shape) for g in inputs.grad_outs]
    grad_weights = torch.zeros_like(inputs.score_weights) if inputs.needs_weights else None
    if len(grad_rows) <= _FEW_READS:
        gradients = [torch.empty_like(row, memory_format=torch.contiguous_format) for row in rows]
        _backward_one_by_one(inputs, grad_rows, rows, gradients, grad_weights)
        results: Sequence[Tensor] = [gradient.view(first.shape) for gradient in gradients]
    else:
        gathered = first.new_empty(rows[0].shape[0], len(rows), first.shape[-1])
        _backward_gathered(inputs, grad_rows, rows, gathered, grad_weights)
        results = gathered.view(*first.shape[:-1], len(rows), first.shape[-1]).unbind(-2)
    if all(grad is None for grad in passed):
        return results, grad_weights
    return [g if p is None else g + p for g, p in zip(results, passed, strict=True)], grad_weights


def _backward_one_by_one(
    inputs: Phase1GradientInputs,
    grad_rows: Sequence[Tensor],
    rows: Sequence[Tensor],
    gradients: Sequence[Tensor],
    grad_weights: Tensor | None,
) -> None:
    """Write the gradients of the sources, N of [tokens, D], and add those of the weights to `grad_weights`."""
    weights, dtype, num_channels = inputs.score_weights, inputs.score_weights.dtype, rows[0].shape[1]
    for chunk in _chunks(rows[0], num_channels, _SOURCE_CHUNK_ELEMENTS):
        grads = torch.stack([row[chunk] for row in grad_rows]).to(dtype)  # [S, n, D]
        values = [row[chunk].to(dtype) for row in rows]
        x, r = inputs.logits[..., chunk], inputs.rstd[:, chunk]
        p = (x - inputs.lse[:, chunk]).exp_()  # [N, S, n]
        dots, scratch = torch.empty_like(p), torch.empty_like(grads)
        for value, dot in zip(values, dots.unbind(0), strict=True):
            torch.sum(torch.mul(grads, value, out=scratch), -1, out=dot)
        delta = torch.mul(p, dots).sum(0)
        if inputs.grad_lse is not None:
            delta -= inputs.grad_lse[:, chunk]
        b = dots.sub_(delta).mul_(p).mul_(r.unsqueeze(1))
        to_value = torch.mul(b, x).sum(1).mul_(r).div_(-num_channels).unsqueeze(-1)  # [N, n, 1]
        to_grads, to_weights = p.unsqueeze(-1), b.unsqueeze(-1)  # [N, S, n, 1]
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
            total = torch.mul(value, to_value[i], out=gradient[chunk] if gradient.dtype == dtype else None)
            for grad, share, weight, factor in zip(grads, to_grads[i], weights, to_weights[i], strict=True):
                total.addcmul_(grad, share).addcmul_(weight, factor)
            if gradient.dtype != dtype:
                gradient[chunk] = total
            if grad_weights is not None:
                grad_weights.addmm_(b[i], value)


def _backward_gathered(
    inputs: Phase1GradientInputs,
    grad_rows: Sequence[Tensor],
    rows: Sequence[Tensor],
    gradients: Tensor,
    grad_weights: Tensor | None,
) -> None:
    """Compute `_backward_one_by_one` for `gradients` [tokens, N, D]: the sources of a token are neighbours."""
    weights, dtype, num_channels = inputs.score_weights, inputs.score_weights.dtype, rows[0].shape[1]
    is_direct = gradients.dtype == dtype
    for chunk in _chunks(rows[0], (len(rows) + len(grad_rows)) * num_channels, _CHUNK_ELEMENTS):
        values = torch.stack([row[chunk] for row in rows], 1).to(dtype)  # [n, N, D]
        grads = torch.stack([row[chunk] for row in grad_rows], 1).to(dtype)  # [n, S, D]
        x, r = inputs.logits[..., chunk].transpose(0, 1), inputs.rstd[:, chunk]
        p = (x - inputs.lse[:, None, chunk]).exp_()  # [S, N, n]
        dots = torch.bmm(grads, values.transpose(1, 2), out=weights.new_empty(len(values), len(weights), len(rows)))
        dots = dots.permute(1, 2, 0).contiguous()  # [S, N, n]
        delta = torch.mul(p, dots).sum(1)
        if inputs.grad_lse is not None:
            delta -= inputs.grad_lse[:, chunk]
        b = dots.sub_(delta.unsqueeze(1)).mul_(p).mul_(r)
        to_value = torch.mul(b, x).sum(0).mul_(r).div_(-num_channels)  # [N, n]
        to_weights = b.permute(2, 1, 0).reshape(-1, len(weights))  # [n N, S]
        total = torch.mul(values, to_value.t().unsqueeze(-1), out=gradients[chunk] if is_direct else None)
        total.view(-1, num_channels).addmm_(to_weights, weights)
        total.baddbmm_(p.permute(2, 1, 0).contiguous(), grads)
        if not is_direct:
            gradients[chunk] = total
        if grad_weights is not None:
            grad_weights.addmm_(to_weights.t(), values.view(-1, num_channels))


def _chunks(like: Tensor, num_elements_per_token: int, num_elements: int) -> Iterator[slice]:
    """Yield slices of the tokens with about `num_elements` elements each on a CPU."""
    if like.device.type != "cpu":
        num_elements = _ACCELERATOR_CHUNK_ELEMENTS
    num_tokens, size = like.numel() // like.shape[-1], max(1, num_elements // num_elements_per_token)
    return (slice(start, start + size) for start in range(0, num_tokens, size))


PHASE1_TORCH = Phase1Impl(_forward, _backward, passes_sources=False)
