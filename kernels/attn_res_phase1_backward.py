r"""Grouped AttnRes reads, phase 1, backward. Notation of `attn_res_phase1`, p_si = exp(x_si - lse_s), g_s = dL/do_s:

    delta_s = sum_i p_si g_s . v_i - dL/dlse_s
    b_si  = p_si (g_s . v_i - delta_s) r_i
    dv_i  = sum_s (p_si g_s + b_si w_s) - (sum_s b_si x_si) (r_i / D) v_i + gradient from later uses
    dw_s  = sum over tokens and i of b_si v_i

The first kernel computes b and the gradients of the sources, in two sweeps over sources and g that a cache holds; the
second one sums dw. Memory traffic is 2N + S matrices (3N + S with gradients from later uses), and N for dw. Every
gradient is written by one program or summed in a fixed order, so that results are deterministic.
"""

from __future__ import annotations

from .attn_res_phase1 import add_product, load_tile, stats_offsets, store_tile, table_pointers
from .launches import matrix_pointer
from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_sources_kernel(
    table_ptr,
    grad_out_table_ptr,
    weights_ptr,
    logits_ptr,
    rstd_ptr,
    lse_ptr,
    grad_lse_ptr,
    dots_ptr,
    factors_ptr,
    like_ptr,
    num_tokens,
    num_sources,
    S: tl.constexpr,
    SP: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute b and the gradients of all sources for BLOCK_T tokens.

    Args:
        table_ptr: addresses [N, 3] of sources, of their gradients, and of their gradients from later uses, or 0; each
            [tokens, D].
        grad_out_table_ptr: addresses [S] of g [tokens, D], 0 for none.
        weights_ptr: w [S, D], in the dtype of sums.
        logits_ptr: x [N, S, tokens].
        rstd_ptr: r [N, tokens].
        lse_ptr: lse [S, tokens].
        grad_lse_ptr: gradient of lse, [S, tokens], or None.
        dots_ptr: scratch memory, [N, S, tokens].
        factors_ptr: output b, [N, S, tokens].
        like_ptr: any source, for its dtype.
        SP: S padded, so that SP * BLOCK_T is at least 16, as `tl.dot` requires.
        GROUP: number of sources loaded together.
    """
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    ROWS: tl.constexpr = GROUP * BLOCK_T
    PAIRS: tl.constexpr = SP * BLOCK_T
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    # Rows are pairs of a source and a token, `pairs` those of a read and a token.
    row_sources = tl.arange(0, ROWS) // BLOCK_T
    row_tokens = first_token + tl.arange(0, ROWS) % BLOCK_T
    reads = tl.arange(0, PAIRS) // BLOCK_T
    tokens = first_token + tl.arange(0, PAIRS) % BLOCK_T
    is_pair = (reads < S) & (tokens < num_tokens)
    same_token = tokens[:, None] == row_tokens[None, :]
    grad_ptrs = table_pointers(grad_out_table_ptr, reads, is_pair, 0, 1, like_ptr)
    has_grad = grad_ptrs.to(tl.int64) != 0
    grad_ptrs += tokens * D
    lse_offsets = reads * tl.cast(num_tokens, tl.int64) + tokens
    lse = tl.load(lse_ptr + lse_offsets, mask=is_pair, other=0.0)
    delta = tl.zeros([PAIRS], dtype)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + lse_offsets, mask=is_pair, other=0.0)

    for first in range(0, num_sources, GROUP):
        sources = first + row_sources
        is_row = (sources < num_sources) & (row_tokens < num_tokens)
        source_ptrs = table_pointers(table_ptr, sources, is_row, 0, 3, like_ptr) + row_tokens * D
        dots = tl.zeros([PAIRS, ROWS], dtype)
        for column in range(0, D, BLOCK_D):
            value = load_tile(source_ptrs, is_row, column, D, BLOCK_D)
            grad = load_tile(grad_ptrs, has_grad, column, D, BLOCK_D)
            # Products of 16-bit numbers are exact.
            dots = tl.dot(grad, tl.trans(value), dots, input_precision="tf32x3", out_dtype=dtype)
        is_term = same_token & is_row[None, :] & is_pair[:, None]
        offsets = stats_offsets(reads, tokens, sources, S, num_tokens)
        logits = tl.load(logits_ptr + offsets, mask=is_term, other=float("-inf"))
        delta += tl.sum(tl.exp(logits - lse[:, None]) * dots, 1)
        tl.store(dots_ptr + offsets, dots, mask=is_term)
    # Other threads of the program load the products.
    tl.debug_barrier()

    for first in range(0, num_sources, GROUP):
        sources = first + row_sources
        is_row = (sources < num_sources) & (row_tokens < num_tokens)
        is_term = same_token & is_row[None, :] & is_pair[:, None]
        offsets = stats_offsets(reads, tokens, sources, S, num_tokens)
        logits = tl.load(logits_ptr + offsets, mask=is_term, other=0.0)
        share = tl.where(is_term, tl.exp(logits - lse[:, None]), 0.0)
        rstd = tl.load(rstd_ptr + sources.to(tl.int64) * num_tokens + row_tokens, mask=is_row, other=0.0)
        dots = tl.load(dots_ptr + offsets, mask=is_term, other=0.0)
        factors = share * (dots - delta[:, None]) * rstd[None, :]
        tl.store(factors_ptr + offsets, factors, mask=is_term)
        to_value = tl.sum(factors * logits, 0) * rstd * (-1.0 / D)
        share = tl.trans(share)
        factors = tl.trans(factors)
        source_ptrs = table_pointers(table_ptr, sources, is_row, 0, 3, like_ptr) + row_tokens * D
        out_ptrs = table_pointers(table_ptr, sources, is_row, 1, 3, like_ptr) + row_tokens * D
        passed_ptrs = table_pointers(table_ptr, sources, is_row, 2, 3, like_ptr)
        is_passed = passed_ptrs.to(tl.int64) != 0
        passed_ptrs += row_tokens * D
        for column in range(0, D, BLOCK_D):
            value = load_tile(source_ptrs, is_row, column, D, BLOCK_D)
            grad = load_tile(grad_ptrs, has_grad, column, D, BLOCK_D)
            weights = load_tile(weights_ptr + reads * D, reads < S, column, D, BLOCK_D)
            total = load_tile(passed_ptrs, is_passed, column, D, BLOCK_D).to(dtype)
            total += to_value[:, None] * value.to(dtype)
            total = add_product(total, share, grad)
            # Not split in 16-bit halves: b may be too large or too small for float16.
            total = tl.dot(factors, weights, total, input_precision="tf32x3", out_dtype=dtype)
            store_tile(out_ptrs, total, is_row, column, D, BLOCK_D)


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_weights_kernel(
    table_ptr,
    factors_ptr,
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
    """Sum dw in BLOCK_D channels over all sources, looping over blocks of BLOCK_T tokens with a stride.

    Args:
        table_ptr: as in `attn_res_phase1_sources_kernel`.
        factors_ptr: b [N, S, tokens], in the dtype of sums.
        grad_weights_ptr: output, [programs, S, D], the part of each program of dw.
        like_ptr: any source, for its dtype.
        SP: S padded to a power of two.
    """
    dtype: tl.constexpr = factors_ptr.dtype.element_ty
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < D
    reads = tl.arange(0, SP)
    is_read = reads < S
    total = tl.zeros([SP, BLOCK_D], dtype)
    # One loop over tokens and, within, sources, so that loads for the next tokens start early.
    num_tiles = tl.cdiv(tl.cdiv(num_tokens, BLOCK_T) - program, tl.num_programs(0))
    for step in range(0, num_tiles * num_sources):
        i = tl.cast(step % num_sources, tl.int64)
        tile = program + step // num_sources * tl.num_programs(0)
        tokens = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        factors = tl.load(
            factors_ptr + (i * S + reads[:, None]) * num_tokens + tokens[None, :],
            mask=is_read[:, None] & in_range[None, :],
            other=0.0,
        )
        value = tl.load(
            matrix_pointer(table_ptr, i, 0, 3, like_ptr) + tokens[:, None] * D + columns[None, :],
            mask=in_range[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(factors, value.to(dtype), total, input_precision="tf32x3", out_dtype=dtype)
    tl.store(
        grad_weights_ptr + (program * S + reads[:, None]) * D + columns[None, :],
        total,
        mask=is_read[:, None] & is_column[None, :],
    )
