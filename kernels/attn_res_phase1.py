r"""Block AttnRes, phase 1: attention to the finished sources, for all reads of a block at once.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. The S reads after the first write of a block have the same
finished sources. With w_s the query of read s times its key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  x_si = r_i (w_s . v_i)
    lse_s = log sum_i exp(x_si),        o_s = sum_i exp(x_si - lse_s) v_i

Phase 2 (`attn_res_phase2.py`) adds the open block to each read.

There are two kernels, because the logits are a matrix product and the weighted sums are not: the first has one program
per source and BLOCK_T tokens, the second one per BLOCK_T tokens and BLOCK_D channels, with the outputs of all reads in
registers. Memory traffic is N + N + S matrices, instead of N S with separate reads. Sources are given by a table of
addresses, so that one binary supports any number of them.

Statistics are x [N, S, tokens] and r [N, tokens].
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
    """Compute x and r of one source for BLOCK_T tokens.

    Args:
        table_ptr: addresses [N] of sources [tokens, D].
        weights_ptr: w [S, D], in the dtype of sums.
        logits_ptr: output x.
        rstd_ptr: output r.
        like_ptr: any source, for its dtype.
        SP: S padded to a power of two of at least 16, as `tl.dot` requires.
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
            # Weights are split in two halves: 16 bits of precision (22 in float16), more than the sources have.
            high = weights.to(raw.dtype)
            low = (weights - high.to(dtype)).to(raw.dtype)
            dots = tl.dot(raw, low, dots, out_dtype=dtype)
            dots = tl.dot(raw, high, dots, out_dtype=dtype)
        else:
            # Three tensor-core products, with 21 of 24 bits of precision.
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
    """Load the statistics [SP, BLOCK_T] of source i from a matrix [N, S, tokens], with `other` for padding."""
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
    """Compute o and lse of all reads for BLOCK_T tokens and BLOCK_D channels.

    Args:
        table_ptr: addresses [N] of sources [tokens, D].
        logits_ptr: x [N, S, tokens].
        out_table_ptr: addresses [S] of outputs o [tokens, D].
        lse_ptr: output, [S, tokens].
        like_ptr: any source, for its dtype.
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
