r"""Phase 1 of grouped AttnRes reads in torch, forward and backward without autograd (`attn_res_phase1_ops`).

Both work on chunks of tokens, whose sources are gathered into one tensor in the dtype of sums: all reads of all
sources are then one batched product with a small matrix for each token. In the backward, the sources of a token are
neighbours, since the batched products of torch are several times slower if their results are not contiguous.
Statistics are [S, N, tokens], since softmaxes and sums over the last axis are several times slower.

The backward is, with g_s = dL/do_s:

    p_si    = exp(x_si - lse_s)
    delta_s = sum_i p_si g_s . v_i - dL/dlse_s
    b_si    = p_si (g_s . v_i - delta_s) r_i
    dL/dv_i = sum_s (p_si g_s + b_si w_s) - (sum_s b_si x_si) r_i v_i / D
    dL/dw_s = sum over tokens and i of b_si v_i

Products have `out=` or are in place, which autocast leaves in their dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.attn_res_group_inputs import Phase1GradientInputs, Phase1Impl, Phase1Inputs, Phase1Result

# Number of elements of all gathered tensors of a chunk. On a CPU, a chunk should stay in cache.
_CHUNK_ELEMENTS = 1 << 19
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 26


def _forward(inputs: Phase1Inputs) -> Phase1Result:
    sources, score_weights, eps = inputs
    first = sources[0]
    num_reads, num_channels = score_weights.shape
    weights = score_weights.to(torch.promote_types(first.dtype, torch.float32))
    rows = [source.reshape(-1, num_channels) for source in sources]
    num_tokens = rows[0].shape[0]
    size = _chunk_size(first, (len(rows) + num_reads) * num_channels)
    pieces = [rows] if num_tokens <= size else list(zip(*(row.split(size) for row in rows), strict=True))
    is_direct = first.dtype == weights.dtype
    if is_direct:
        # The reads of a token are neighbours, as the batched product writes them.
        whole = weights.new_empty(num_tokens, num_reads, num_channels)
        outs = whole.view(*first.shape[:-1], num_reads, num_channels).unbind(-2)
        parts = [_forward_chunk(*args, weights, eps) for args in zip(pieces, whole.split(size), strict=True)]
    else:
        # In tensors of their own, since phase 2 keeps all but the first for its backward.
        outs = tuple(first.new_empty(first.shape) for _ in range(num_reads))
        parts = []
        for i, values in enumerate(pieces):
            mixed = weights.new_empty(values[0].shape[0], num_reads, num_channels)
            parts.append(_forward_chunk(values, mixed, weights, eps))
            for out, of_read in zip(outs, mixed.unbind(1), strict=True):
                out.view(num_tokens, num_channels)[i * size : (i + 1) * size] = of_read
    lse, logits, rstd = parts[0] if len(parts) == 1 else (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return Phase1Result(outs, lse, logits.transpose(0, 1), rstd)


def _forward_chunk(
    rows: Sequence[Tensor], mixed: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Write o to `mixed` [n, S, D]; return lse [S, n], the logits [S, N, n] and 1 / rms [N, n]."""
    num_sources, (num_tokens, num_reads, num_channels) = len(rows), mixed.shape
    values = torch.cat(list(rows)).to(weights.dtype)  # [N n, D]
    r = torch.linalg.vector_norm(values, dim=-1)
    r = torch.full_like(r, eps).addcmul_(r, r, value=1 / num_channels).rsqrt_()
    x = torch.mm(weights, values.t(), out=weights.new_empty(num_reads, values.shape[0])).mul_(r)
    x = x.view(num_reads, num_sources, num_tokens)
    log_shares = x.log_softmax(1)
    lse = x[:, 0] - log_shares[:, 0]
    shares = log_shares.exp_().permute(2, 0, 1).contiguous()  # [n, S, N]
    torch.bmm(shares, values.view(num_sources, num_tokens, num_channels).transpose(0, 1), out=mixed)
    return lse, x, r.view(num_sources, num_tokens)


def _backward(inputs: Phase1GradientInputs) -> tuple[Sequence[Tensor], Tensor | None]:
    grad_outs, grad_lse, passed, sources, weights, lse, logits, rstd, needs_weights = inputs
    first = sources[0]
    num_reads, num_channels = weights.shape
    num_sources, num_tokens = rstd.shape
    rows = [source.reshape(-1, num_channels) for source in sources]
    grad_rows = [torch.zeros_like(rows[0]) if g is None else g.reshape(-1, num_channels) for g in grad_outs]
    gradients = first.new_empty(num_tokens, num_sources, num_channels)
    grad_weights = torch.zeros_like(weights) if needs_weights else None
    x = logits.transpose(0, 1)  # [S, N, tokens]
    size = _chunk_size(first, (num_sources + num_reads) * num_channels)
    if num_tokens <= size:
        _backward_chunk(grad_rows, grad_lse, rows, weights, lse, x, rstd, gradients, grad_weights)
    else:
        for chunk in (slice(start, start + size) for start in range(0, num_tokens, size)):
            _backward_chunk(
                [row[chunk] for row in grad_rows],
                None if grad_lse is None else grad_lse[:, chunk],
                [row[chunk] for row in rows],
                weights,
                lse[:, chunk],
                x[:, :, chunk],
                rstd[:, chunk],
                gradients[chunk],
                grad_weights,
            )
    results = gradients.view(*first.shape[:-1], num_sources, num_channels).unbind(-2)
    if all(grad is None for grad in passed):
        return results, grad_weights
    return [g if p is None else g + p for g, p in zip(results, passed, strict=True)], grad_weights


def _backward_chunk(
    grad_rows: Sequence[Tensor],
    grad_lse: Tensor | None,
    rows: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor,
    x: Tensor,
    r: Tensor,
    gradients: Tensor,
    grad_weights: Tensor | None,
) -> None:
    """Write the gradients of the sources to `gradients` [n, N, D] and add those of the weights to `grad_weights`."""
    num_tokens, num_sources, num_channels = gradients.shape
    dtype = weights.dtype
    values, grads = (
        torch.stack(list(rows), 1).to(dtype),
        torch.stack(list(grad_rows), 1).to(dtype),
    )  # [n, N, D], [n, S, D]
    p = (x - lse.unsqueeze(1)).exp_()  # [S, N, n]
    dots = torch.bmm(grads, values.transpose(1, 2), out=weights.new_empty(num_tokens, len(weights), num_sources))
    dots = dots.permute(1, 2, 0).contiguous()  # [S, N, n]
    delta = torch.mul(p, dots).sum(1)
    if grad_lse is not None:
        delta -= grad_lse
    b = dots.sub_(delta.unsqueeze(1)).mul_(p).mul_(r)
    to_value = torch.mul(b, x).sum(0).mul_(r).div_(-num_channels)  # [N, n]
    to_weights = b.permute(2, 1, 0).reshape(-1, len(weights))  # [n N, S]
    flat_values = values.view(-1, num_channels)
    is_direct = gradients.dtype == dtype
    total = torch.mul(values, to_value.t().unsqueeze(-1), out=gradients if is_direct else None)
    total.view(-1, num_channels).addmm_(to_weights, weights)
    total.baddbmm_(p.permute(2, 1, 0).contiguous(), grads)
    if not is_direct:
        gradients.copy_(total)
    if grad_weights is not None:
        grad_weights.addmm_(to_weights.t(), flat_values)


def _chunk_size(like: Tensor, num_elements_per_token: int) -> int:
    num_elements = _CHUNK_ELEMENTS if like.device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
    return max(1, num_elements // num_elements_per_token)


PHASE1_TORCH = Phase1Impl(_forward, _backward, passes_sources=False)
