r"""AttnRes read, forward: one pass over the sources of a token with an online softmax.

Paper: arXiv 2603.15031, Eq. 2-4. For source i of a token, w the query times the key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  s_i = r_i (w . v_i),  h = read_scale * sum_i softmax_i(s) v_i

Every source is loaded once. Sums are float32 (in the interpreter float64 for float64 sources).

Phase 2 of grouped reads (`attn_res_phase2_ops`) adds two options: a prior, which is a read o of phase 1 with its
log-sum-exp and takes part as a source v_0 = o with the logit s_0 = lse; and an update, which is added to the last
source first. The prior is in maximum and sum, but has no other statistics.

Statistics are a float32 matrix [tokens, 2 + 2 N], with N the number of sources of the whole read, and the columns

    0           max over i of s_i
    1           sum over i of exp(s_i - max)
    2 + i       s_i, the logits
    2 + N + i   r_i

The statistics of a token are contiguous, so that their addresses differ by constants and need no registers.
"""

from __future__ import annotations

from .row_tiles import (
    add_rows,
    add_scaled,
    convert_row,
    jit,
    load_row,
    load_vector,
    scale_row,
    settle,
    square_and_dot,
    store_row,
)

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "num_sources", "first_source", "read_scale"])
def attn_res_read_kernel(
    source_ptrs,
    weight_ptr,
    carry_ptr,
    out_ptr,
    stats_ptr,
    read_scale,
    num_tokens,
    num_sources,
    first_source,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    prior_ptr=None,
    prior_lse_ptr=None,
    update_ptr=None,
    newest_ptr=None,
):
    """Read the sources of this launch; a read of many sources needs several launches.

    Args:
        source_ptrs: tuple of matrices [tokens, D], the sources from `first_source` on.
        weight_ptr: w [D], in the dtype of sums.
        carry_ptr: [tokens, D] in the dtype of sums, the sum of exp(s_i - max) v_i between launches, or None.
        out_ptr: output, [tokens, D]; None in all launches but the last.
        stats_ptr: statistics, see the module docstring; maximum and sum are also the state between launches.
        num_sources: N, over all launches.
        IS_FIRST: whether this is the first launch of the read.
        IS_LAST: whether this is the last launch of the read.
        prior_ptr: o [tokens, D], in the first launch of a read with a prior, or None.
        prior_lse_ptr: lse [tokens], or None.
        update_ptr: matrix [tokens, D] to be added to the last source, in the last launch, or None.
        newest_ptr: output, [tokens, D], the rounded sum, or None.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    N: tl.constexpr = len(source_ptrs)
    # With 32-bit sources, registers do not hold the next source beside an update.
    LOAD_AHEAD: tl.constexpr = update_ptr is None or source_ptrs[0].dtype.element_ty.primitive_bitwidth <= 16
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    stats = stats_ptr + tokens * (2 + 2 * num_sources)
    logits = stats + 2 + first_source
    rstds = logits + num_sources
    weight = load_vector(weight_ptr, D, BLOCK_D, dtype)

    following = load_row(source_ptrs[0], tokens, in_range, D, BLOCK_T, BLOCK_D)
    if not IS_FIRST:
        top = tl.load(stats, mask=in_range, other=0.0)
        total = tl.load(stats + 1, mask=in_range, other=1.0)
        mix = load_row(carry_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
    elif prior_ptr is not None:
        top = tl.load(prior_lse_ptr + tokens, mask=in_range, other=0.0)
        total = tl.full([BLOCK_T], 1.0, dtype)
        mix = load_row(prior_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
    for i in tl.static_range(N):
        if i > 0 and not LOAD_AHEAD:
            # Otherwise the compiler loads several sources at once and spills registers.
            tl.debug_barrier()
            following = load_row(source_ptrs[i], tokens, in_range, D, BLOCK_T, BLOCK_D)
        value = convert_row(following, dtype)
        # Load the next source before the reduction over channels of this one.
        if i + 1 < N and LOAD_AHEAD:
            following = load_row(source_ptrs[i + 1], tokens, in_range, D, BLOCK_T, BLOCK_D)
        if i + 1 == N and update_ptr is not None:
            update = load_row(update_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
            rounded = convert_row(add_rows(value, update), newest_ptr.dtype.element_ty)
            store_row(newest_ptr, rounded, tokens, in_range, D, BLOCK_T, BLOCK_D)
            value = convert_row(rounded, dtype)
        square, dot = square_and_dot(value, weight)
        rstd = tl.rsqrt(square * (1.0 / D) + EPS)
        logit = dot * rstd
        tl.store(logits + i, logit, mask=in_range)
        tl.store(rstds + i, rstd, mask=in_range)
        if IS_FIRST and i == 0 and prior_ptr is None:
            top = logit
            total = tl.full([BLOCK_T], 1.0, dtype)
            mix = value
        else:
            new_top = tl.maximum(top, logit)
            shrink = tl.exp(top - new_top)
            share = tl.exp(logit - new_top)
            top = new_top
            total = total * shrink + share
            mix = settle(add_scaled(scale_row(mix, shrink), value, share))
    tl.store(stats, top, mask=in_range)
    tl.store(stats + 1, total, mask=in_range)
    if IS_LAST:
        store_row(out_ptr, scale_row(mix, read_scale / total), tokens, in_range, D, BLOCK_T, BLOCK_D)
    else:
        store_row(carry_ptr, mix, tokens, in_range, D, BLOCK_T, BLOCK_D)
