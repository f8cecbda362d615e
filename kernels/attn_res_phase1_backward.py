r"""Block AttnRes, phase 1, backward. Notation of `attn_res_phase1`, p_si = exp(x_si - lse_s), g_s = dL/do_s:

    dx_si = p_si (g_s . v_i - sum_j p_sj g_s . v_j + dL/dlse_s)
    dv_i  = sum_s (p_si g_s + dx_si r_i w_s) - (sum_s dx_si x_si) (r_i^2 / D) v_i
    dw_s  = sum over tokens and i of dx_si r_i v_i

The first kernel computes the products g_s . v_i, the second the gradients. Every gradient is written by one program or
summed in a fixed order, so that results are deterministic.
"""

from __future__ import annotations

from .attn_res_phase1 import load_stats
from .launches import matrix_pointer
from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_dots_kernel(
    table_ptr,
    grad_out_table_ptr,
    dots_ptr,
    like_ptr,
    num_tokens,
    num_sources,
    S: tl.constexpr,
    SP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute g_s . v_i of one source for BLOCK_T tokens. Programs of successive sources share gradients in cache.

    Args:
        table_ptr: addresses [N, 2] of sources and of their gradients [tokens, D].
        grad_out_table_ptr: addresses [S] of g [tokens, D].
        dots_ptr: output, [N, S, tokens], in the dtype of sums.
        like_ptr: any source, for its dtype.
    """
    dtype: tl.constexpr = dots_ptr.dtype.element_ty
    # Both indices on the first axis, since the size of the others is limited to 65535.
    i = (tl.program_id(0) % num_sources).to(tl.int64)
    tokens = (tl.program_id(0) // num_sources).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    reads = tl.arange(0, SP)
    source_ptr = matrix_pointer(table_ptr, i, 0, 2, like_ptr)
    grad_ptrs = tl.load(grad_out_table_ptr + reads, mask=reads < S, other=0)
    grad_ptrs = tl.multiple_of(grad_ptrs, 16).to(like_ptr.dtype)
    products = tl.zeros([SP, BLOCK_T, BLOCK_D], dtype)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        offsets = tokens[:, None] * D + columns[None, :]
        is_element = in_range[:, None] & (columns < D)[None, :]
        value = tl.load(source_ptr + offsets, mask=is_element, other=0.0).to(dtype)
        grad = tl.load(
            grad_ptrs[:, None, None] + offsets[None, :, :],
            mask=(reads < S)[:, None, None] & is_element[None, :, :],
            other=0.0,
        ).to(dtype)
        products += grad * value[None, :, :]
    tl.store(
        dots_ptr + (i * S + reads[:, None]) * num_tokens + tokens[None, :],
        tl.sum(products, 2),
        mask=(reads < S)[:, None] & in_range[None, :],
    )


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_grads_kernel(
    table_ptr,
    grad_out_table_ptr,
    weights_ptr,
    logits_ptr,
    rstd_ptr,
    lse_ptr,
    grad_lse_ptr,
    dots_ptr,
    grad_weights_ptr,
    like_ptr,
    num_tokens,
    num_sources,
    S: tl.constexpr,
    SP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of all sources in BLOCK_D channels, looping over blocks of BLOCK_T tokens with a stride.

    Args:
        table_ptr: addresses [N, 2] of sources and of their gradients [tokens, D].
        grad_out_table_ptr: addresses [S] of g [tokens, D].
        weights_ptr: w [S, D].
        logits_ptr: x [N, S, tokens].
        rstd_ptr: r [N, tokens].
        lse_ptr: lse [S, tokens].
        grad_lse_ptr: gradient of lse, [S, tokens].
        dots_ptr: g . v [N, S, tokens].
        grad_weights_ptr: output, [programs, S, D], the part of each program of dw.
        like_ptr: any source, for its dtype.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < D
    reads = tl.arange(0, SP)
    is_read = reads < S
    weights = tl.load(
        weights_ptr + reads[:, None] * D + columns[None, :], mask=is_read[:, None] & is_column[None, :], other=0.0
    )
    grad_ptrs = tl.load(grad_out_table_ptr + reads, mask=is_read, other=0)
    grad_ptrs = tl.multiple_of(grad_ptrs, 16).to(like_ptr.dtype)
    grad_weights = tl.zeros([SP, BLOCK_D], dtype)
    for tile in range(program, tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        offsets = tokens[:, None] * D + columns[None, :]
        is_element = in_range[:, None] & is_column[None, :]
        lse = load_stats(lse_ptr, 0, tokens, in_range, num_tokens, S, SP, float("inf"))
        delta = -load_stats(grad_lse_ptr, 0, tokens, in_range, num_tokens, S, SP, 0.0)
        for i in range(0, num_sources):
            share = tl.exp(load_stats(logits_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0) - lse)
            delta += share * load_stats(dots_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0)
        grad = tl.load(
            grad_ptrs[:, None, None] + offsets[None, :, :],
            mask=is_read[:, None, None] & is_element[None, :, :],
            other=0.0,
        ).to(dtype)
        for i in range(0, num_sources):
            logits = load_stats(logits_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0)
            share = tl.exp(logits - lse)
            rstd = tl.load(rstd_ptr + tl.cast(i, tl.int64) * num_tokens + tokens, mask=in_range, other=0.0)
            dots = load_stats(dots_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0)
            to_weight = share * (dots - delta) * rstd[None, :]
            to_value = tl.sum(to_weight * logits, 0) * rstd * (-1.0 / D)
            value = tl.load(matrix_pointer(table_ptr, i, 0, 2, like_ptr) + offsets, mask=is_element, other=0.0)
            value = value.to(dtype)
            grad_value = tl.sum(share[:, :, None] * grad + to_weight[:, :, None] * weights[:, None, :], 0)
            grad_value += to_value[:, None] * value
            tl.store(
                matrix_pointer(table_ptr, i, 1, 2, like_ptr) + offsets,
                grad_value.to(like_ptr.dtype.element_ty),
                mask=is_element,
            )
            grad_weights = tl.dot(to_weight, value, grad_weights, input_precision="tf32x3", out_dtype=dtype)
    tl.store(
        grad_weights_ptr + (program * S + reads[:, None]) * D + columns[None, :],
        grad_weights,
        mask=is_read[:, None] & is_column[None, :],
    )
