r"""Grouped AttnRes reads, phase 1: attention to the finished sources, for all reads of a group at once.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. The S reads of a group have the same finished sources. With w_s
the query of read s times its key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  x_si = r_i (w_s . v_i)
    lse_s = log sum_i exp(x_si),        o_s = sum_i exp(x_si - lse_s) v_i

Phase 2 (`attn_res_phase2.py`) adds the newer sources to each read.

A program computes everything of BLOCK_T tokens, so few that their sources stay in cache: a first sweep over the
sources computes the logits, a second one the weighted sums. Memory traffic is N + S matrices, instead of N S with
separate reads. Sources are given by a table of addresses, so that one binary supports any number of them.

Both sweeps are matrix products over pairs of a source and a token, and of a read and a token; products of different
tokens are masked. Statistics are x [N, S, tokens] and r [N, tokens].
"""

from __future__ import annotations

from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit()
def table_pointers(table_ptr, rows, is_row, column: tl.constexpr, COLUMNS: tl.constexpr, like_ptr):
    """Return addresses of rows of a table, multiples of 16, as pointers of the type of `like_ptr`; 0 without a row."""
    addresses = tl.load(table_ptr + rows * COLUMNS + column, mask=is_row, other=0)
    return tl.multiple_of(addresses, 16).to(like_ptr.dtype)


@jit()
def load_tile(row_ptrs, is_row, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load BLOCK_D channels from `first` on of rows that are given by pointers; those that are not rows are zero."""
    columns = first + tl.arange(0, BLOCK_D)
    return tl.load(row_ptrs[:, None] + columns[None, :], mask=is_row[:, None] & (columns < D)[None, :], other=0.0)


@jit()
def store_tile(row_ptrs, tile, is_row, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store BLOCK_D channels from `first` on, rounded; the inverse of `load_tile`."""
    columns = first + tl.arange(0, BLOCK_D)
    tile = tile.to(row_ptrs.dtype.element_ty)
    tl.store(row_ptrs[:, None] + columns[None, :], tile, mask=is_row[:, None] & (columns < D)[None, :])


@jit()
def add_product(total, wide, raw):
    """Return total + wide @ raw, with `total` and `wide` in the dtype of sums, and `raw` in that of the sources."""
    dtype: tl.constexpr = total.dtype
    if raw.dtype.primitive_bitwidth == 16:
        # Split in two halves: 16 bits of precision (22 in float16), more than the sources have.
        high = wide.to(raw.dtype)
        low = (wide - high.to(dtype)).to(raw.dtype)
        total = tl.dot(low, raw, total, out_dtype=dtype)
        total = tl.dot(high, raw, total, out_dtype=dtype)
    else:
        # Three tensor-core products, with 21 of 24 bits of precision.
        total = tl.dot(wide, raw, total, input_precision="tf32x3", out_dtype=dtype)
    return total


@jit()
def stats_offsets(pairs, tokens, sources, S: tl.constexpr, num_tokens):
    """Return offsets of x, [pairs, sources], in a matrix [N, S, tokens]."""
    return (tl.cast(sources, tl.int64)[None, :] * S + pairs[:, None]) * num_tokens + tokens[:, None]


@jit(do_not_specialize=["num_tokens", "num_sources"])
def attn_res_phase1_kernel(
    table_ptr,
    out_table_ptr,
    weights_ptr,
    lse_ptr,
    logits_ptr,
    rstd_ptr,
    like_ptr,
    num_tokens,
    num_sources,
    EPS: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute o and lse of all reads, and the statistics, for BLOCK_T tokens.

    Args:
        table_ptr: addresses [N] of sources [tokens, D].
        out_table_ptr: addresses [S] of outputs o [tokens, D].
        weights_ptr: w [S, D], in the dtype of sums.
        lse_ptr: output, [S, tokens].
        logits_ptr: output x.
        rstd_ptr: output r.
        like_ptr: any source, for its dtype.
        SP: S padded, so that SP * BLOCK_T is at least 16, as `tl.dot` requires.
        GROUP: number of sources loaded together.
    """
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    ROWS: tl.constexpr = GROUP * BLOCK_T
    PAIRS: tl.constexpr = SP * BLOCK_T
    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    # Rows are pairs of a source and a token.
    row_sources = tl.arange(0, ROWS) // BLOCK_T
    row_tokens = first_token + tl.arange(0, ROWS) % BLOCK_T
    # Of the logits, all reads of a row are computed.
    all_reads = tl.arange(0, PAIRS)
    is_read = all_reads < S
    for first in range(0, num_sources, GROUP):
        sources = first + row_sources
        is_row = (sources < num_sources) & (row_tokens < num_tokens)
        source_ptrs = table_pointers(table_ptr, sources, is_row, 0, 1, like_ptr) + row_tokens * D
        dots = tl.zeros([PAIRS, ROWS], dtype)
        squares = tl.zeros([ROWS, BLOCK_D], dtype)
        for column in range(0, D, BLOCK_D):
            raw = load_tile(source_ptrs, is_row, column, D, BLOCK_D)
            weights = load_tile(weights_ptr + all_reads * D, is_read, column, D, BLOCK_D)
            dots = add_product(dots, weights, tl.trans(raw))
            value = raw.to(dtype)
            squares += value * value
        rstd = tl.rsqrt(tl.sum(squares, 1) * (1.0 / D) + EPS)
        tl.store(rstd_ptr + sources.to(tl.int64) * num_tokens + row_tokens, rstd, mask=is_row)
        offsets = (sources.to(tl.int64)[None, :] * S + all_reads[:, None]) * num_tokens + row_tokens[None, :]
        tl.store(logits_ptr + offsets, dots * rstd[None, :], mask=is_read[:, None] & is_row[None, :])
    # Other threads of the program load the logits.
    tl.debug_barrier()

    # Pairs of a read and a token.
    reads = tl.arange(0, PAIRS) // BLOCK_T
    tokens = first_token + tl.arange(0, PAIRS) % BLOCK_T
    is_pair = (reads < S) & (tokens < num_tokens)
    same_token = tokens[:, None] == row_tokens[None, :]
    top = tl.full([PAIRS], float("-inf"), dtype)
    total = tl.zeros([PAIRS], dtype)
    for first in range(0, num_sources, GROUP):
        sources = first + row_sources
        is_term = same_token & (sources < num_sources)[None, :]
        offsets = stats_offsets(reads, tokens, sources, S, num_tokens)
        logits = tl.load(logits_ptr + offsets, mask=is_term & is_pair[:, None], other=0.0)
        logits = tl.where(is_term, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log(total)
    tl.store(lse_ptr + reads * tl.cast(num_tokens, tl.int64) + tokens, lse, mask=is_pair)

    out_ptrs = table_pointers(out_table_ptr, reads, is_pair, 0, 1, like_ptr) + tokens * D
    mix = tl.zeros([PAIRS, BLOCK_D], dtype)
    # One loop over channels and, within, sources, so that loads of the next channels start early.
    num_groups = tl.cdiv(num_sources, GROUP)
    for step in range(0, tl.cdiv(D, BLOCK_D) * num_groups):
        column = step // num_groups * BLOCK_D
        group = step % num_groups
        sources = group * GROUP + row_sources
        is_row = (sources < num_sources) & (row_tokens < num_tokens)
        source_ptrs = table_pointers(table_ptr, sources, is_row, 0, 1, like_ptr) + row_tokens * D
        is_term = same_token & is_row[None, :] & is_pair[:, None]
        logits = tl.load(
            logits_ptr + stats_offsets(reads, tokens, sources, S, num_tokens), mask=is_term, other=float("-inf")
        )
        share = tl.exp(logits - lse[:, None])
        mix = add_product(tl.where(group == 0, 0.0, mix), share, load_tile(source_ptrs, is_row, column, D, BLOCK_D))
        # Only the last group of sources stores the sums.
        is_complete = tl.where(group == num_groups - 1, reads, S) < S
        store_tile(out_ptrs, mix, is_pair & is_complete, column, D, BLOCK_D)
