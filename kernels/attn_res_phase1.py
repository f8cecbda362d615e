r"""Block AttnRes, phase 1: all queries of a block against the finished sources, in one go.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. The S reads that follow the first write of a block see the same
finished sources. With w_s the query of read s times its key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  x_si = r_i (w_s . v_i)
    lse_s = log sum_i exp(x_si),        o_s = sum_i exp(x_si - lse_s) v_i

Phase 2 (`attn_res_phase2.py`) adds the open block to each read when it is there.

The logits are a skinny matrix product and the mix is not, so they are two kernels: the first has a program per source
and BLOCK_T tokens, the second one per BLOCK_T tokens and BLOCK_D channels, with all reads in its registers. Sources
are N + N + S matrices of traffic instead of the N S of separate reads. Sources come as a table of addresses, so that a
binary serves any number of them.

Statistics are [N, S, tokens] (x) and [N, tokens] (r), those of one source and read contiguous over tokens.
"""

from __future__ import annotations

from .launches import matrix_pointer
from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens"])
def attn_res_phase1_logits_kernel(
    table_ptr,
    weights_ptr,
    logits_ptr,
    rstd_ptr,
    like_ptr,
    num_tokens,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x and r of one source, for BLOCK_T tokens.

    Args:
        table_ptr: [N] addresses of sources [tokens, D].
        weights_ptr: w [S, D], of the dtype of the sums.
        logits_ptr, rstd_ptr: x and r.
        like_ptr: any source, for its type.
        SP: S padded to a power of two from 16 on, which products need.
    """
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    i = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    reads = tl.arange(0, SP)
    source_ptr = matrix_pointer(table_ptr, i, 0, 1, like_ptr)
    dots = tl.zeros([BLOCK_T, SP], dtype)
    squares = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        is_column = columns < D
        raw = tl.load(
            source_ptr + tokens[:, None] * D + columns[None, :], mask=in_range[:, None] & is_column[None, :], other=0.0
        )
        value = raw.to(dtype)
        weights = tl.load(
            weights_ptr + reads[None, :] * D + columns[:, None],
            mask=(reads < S)[None, :] & is_column[:, None],
            other=0.0,
        )
        if like_ptr.dtype.element_ty.primitive_bitwidth == 16:
            # The two halves of a weight keep 16 bits of it (22 in float16), far more than the sources have.
            high = weights.to(raw.dtype)
            low = (weights - high.to(dtype)).to(raw.dtype)
            dots = tl.dot(raw, low, dots, out_dtype=dtype)
            dots = tl.dot(raw, high, dots, out_dtype=dtype)
        else:
            # Three tensor-core products keep 21 bits of the 24.
            dots = tl.dot(value, weights, dots, input_precision="tf32x3", out_dtype=dtype)
        squares += value * value
    rstd = tl.rsqrt(tl.sum(squares, 1) * (1.0 / D) + EPS)
    tl.store(rstd_ptr + i * num_tokens + tokens, rstd, mask=in_range)
    tl.store(
        logits_ptr + (i * S + reads[None, :]) * num_tokens + tokens[:, None],
        dots * rstd[:, None],
        mask=in_range[:, None] & (reads < S)[None, :],
    )


@jit()
def load_stats(ptr, i, tokens, in_range, num_tokens, S: tl.constexpr, SP: tl.constexpr, other: tl.constexpr):
    """Statistics [SP, BLOCK_T] of source i from a matrix [N, S, tokens]; `other` for reads that are not there."""
    reads = tl.arange(0, SP)
    return tl.load(
        ptr + (tl.cast(i, tl.int64) * S + reads[:, None]) * num_tokens + tokens[None, :],
        mask=(reads < S)[:, None] & in_range[None, :],
        other=other,
    )


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_mix_kernel(
    table_ptr,
    logits_ptr,
    out_table_ptr,
    lse_ptr,
    like_ptr,
    num_tokens,
    num_sources,
    S: tl.constexpr,
    SP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o and lse of all reads, for BLOCK_T tokens and BLOCK_D channels.

    Args:
        table_ptr: [N] addresses of sources [tokens, D].
        logits_ptr: x [N, S, tokens].
        out_table_ptr: [S] addresses of o [tokens, D].
        lse_ptr: [S, tokens].
        like_ptr: any source, for its type.
        SP: S padded to a power of two.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    reads = tl.arange(0, SP)
    offsets = tokens[:, None] * D + columns[None, :]
    is_element = in_range[:, None] & (columns < D)[None, :]

    top = tl.full([SP, BLOCK_T], float("-inf"), dtype)
    for i in range(0, num_sources):
        top = tl.maximum(top, load_stats(logits_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0))
    total = tl.zeros([SP, BLOCK_T], dtype)
    mix = tl.zeros([SP, BLOCK_T, BLOCK_D], dtype)
    for i in range(0, num_sources):
        share = tl.exp(load_stats(logits_ptr, i, tokens, in_range, num_tokens, S, SP, 0.0) - top)
        source_ptr = matrix_pointer(table_ptr, i, 0, 1, like_ptr)
        value = tl.load(source_ptr + offsets, mask=is_element, other=0.0).to(dtype)
        total += share
        mix += share[:, :, None] * value[None, :, :]
    mix = mix * (1.0 / total)[:, :, None]
    out_ptrs = tl.load(out_table_ptr + reads, mask=reads < S, other=0)
    out_ptrs = tl.multiple_of(out_ptrs, 16).to(like_ptr.dtype)
    tl.store(
        out_ptrs[:, None, None] + offsets[None, :, :],
        mix.to(like_ptr.dtype.element_ty),
        mask=(reads < S)[:, None, None] & is_element[None, :, :],
    )
    if tl.program_id(1) == 0:
        tl.store(
            lse_ptr + reads[:, None] * num_tokens + tokens[None, :],
            top + tl.log(total),
            mask=(reads < S)[:, None] & in_range[None, :],
        )
