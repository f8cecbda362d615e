r"""Grouped AttnRes reads, phase 2 of one source: add the open block to a read of the finished sources from phase 1.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. With o and lse of one read from phase 1, and y the output of the
previous sublayer:

    v     = round(partial + y),  r = 1 / sqrt(mean(v^2) + eps),  x = r (w . v)
    gate  = sigmoid(x - lse)
    h     = read_scale ((1 - gate) o + gate v)

which is the softmax over all sources. One pass loads partial, y and o, and stores v and h.

Backward, with g = read_scale dL/dh and the rest as in `attn_res_read_backward`:

    dx = gate (1 - gate) g . (v - o) = gate g . (v - h / read_scale) = -dL/dlse,   do = (1 - gate) g
    dv = gate g + dx r w - (dx x r^2 / D) v + gradient from later uses,   dw = sum over tokens of dx r v

Statistics of a token are x, r and lse: [tokens, 3].
"""

from __future__ import annotations

from .row_tiles import (
    add_rows,
    add_scaled,
    convert_row,
    dot_rows,
    jit,
    load_row,
    load_vector,
    scale_row,
    settle,
    square_and_dot,
    store_row,
    store_token_sum,
    zero_row,
)

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "read_scale"])
def attn_res_phase2_kernel(
    partial_ptr,
    update_ptr,
    prior_ptr,
    lse_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    stats_ptr,
    read_scale,
    num_tokens,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute one read of BLOCK_T tokens.

    Args:
        partial_ptr: the open block, [tokens, D].
        update_ptr: y [tokens, D], or None for v = partial.
        prior_ptr: o of phase 1, [tokens, D].
        lse_ptr: lse of phase 1, [tokens].
        weight_ptr: w [D], in the dtype of sums.
        out_ptr: output h, [tokens, D].
        sum_ptr: output v [tokens, D], or None without an update.
        stats_ptr: output, [tokens, 3].
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    value = load_row(partial_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
    if update_ptr is not None:
        update = load_row(update_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
        rounded = convert_row(add_rows(value, update), sum_ptr.dtype.element_ty)
        store_row(sum_ptr, rounded, tokens, in_range, D, BLOCK_T, BLOCK_D)
        value = convert_row(rounded, dtype)
    finished = load_row(prior_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
    lse = tl.load(lse_ptr + tokens, mask=in_range, other=0.0)
    square, dot = square_and_dot(value, load_vector(weight_ptr, D, BLOCK_D, dtype))
    rstd = tl.rsqrt(square * (1.0 / D) + EPS)
    logit = dot * rstd
    gate = tl.sigmoid(logit - lse)
    # Not 1 - gate, which would lose all precision for a gate near 1.
    rest = tl.sigmoid(lse - logit)
    h = add_scaled(scale_row(value, gate * read_scale), convert_row(finished, dtype), rest * read_scale)
    store_row(out_ptr, h, tokens, in_range, D, BLOCK_T, BLOCK_D)
    tl.store(stats_ptr + tokens * 3, logit, mask=in_range)
    tl.store(stats_ptr + tokens * 3 + 1, rstd, mask=in_range)
    tl.store(stats_ptr + tokens * 3 + 2, lse, mask=in_range)


@jit(do_not_specialize=["num_tokens", "read_scale"])
def attn_res_phase2_backward_kernel(
    grad_out_ptr,
    passed_ptr,
    sum_ptr,
    kept_ptr,
    weight_ptr,
    stats_ptr,
    grad_partial_ptr,
    grad_prior_ptr,
    grad_lse_ptr,
    grad_weight_ptr,
    read_scale,
    num_tokens,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEPS_READ: tl.constexpr,
):
    """Compute the gradients of one read. A program loops over tokens with a stride, and sums its part of dw.

    Args:
        grad_out_ptr: dL/dh, [tokens, D].
        passed_ptr: gradient of v from later uses, [tokens, D], or None.
        sum_ptr: v [tokens, D].
        kept_ptr: h or o, [tokens, D].
        weight_ptr: as in the forward.
        stats_ptr: as in the forward.
        grad_partial_ptr: output, the gradient of v, which is also that of partial and y, [tokens, D].
        grad_prior_ptr: output, the gradient of o, [tokens, D].
        grad_lse_ptr: output, the gradient of lse, [tokens].
        grad_weight_ptr: output, [programs, D].
        KEEPS_READ: whether `kept_ptr` is h.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    program = tl.program_id(0)
    grad_weight = zero_row(D, BLOCK_T, BLOCK_D, dtype)
    for tile in range(program, tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        logit = tl.load(stats_ptr + tokens * 3, mask=in_range, other=0.0)
        rstd = tl.load(stats_ptr + tokens * 3 + 1, mask=in_range, other=0.0)
        lse = tl.load(stats_ptr + tokens * 3 + 2, mask=in_range, other=0.0)
        gate = tl.sigmoid(logit - lse)
        rest = tl.sigmoid(lse - logit)
        value = load_row(sum_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
        kept = load_row(kept_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
        grad_out = load_row(grad_out_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
        to_gate = gate * dot_rows(grad_out, value) * read_scale
        if KEEPS_READ:
            to_gate -= gate * dot_rows(grad_out, kept)
        else:
            to_gate = rest * (to_gate - gate * dot_rows(grad_out, kept) * read_scale)
        grad = settle(scale_row(grad_out, tl.full([BLOCK_T], 1.0, dtype) * read_scale))
        store_row(grad_prior_ptr, scale_row(grad, rest), tokens, in_range, D, BLOCK_T, BLOCK_D)
        tl.store(grad_lse_ptr + tokens, -to_gate, mask=in_range)
        to_weight = to_gate * rstd
        grad_weight = settle(add_scaled(grad_weight, value, to_weight))
        grad_value = add_scaled(scale_row(grad, gate), value, -to_weight * logit * rstd * (1.0 / D))
        weight = load_vector(weight_ptr, D, BLOCK_D, dtype)
        grad_value = add_scaled(grad_value, weight, to_weight)
        if passed_ptr is not None:
            grad_value = add_rows(grad_value, load_row(passed_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype))
        store_row(grad_partial_ptr, grad_value, tokens, in_range, D, BLOCK_T, BLOCK_D)
    store_token_sum(grad_weight_ptr + program * D, grad_weight, D, BLOCK_D)
