r"""AttnRes read for a few tokens: one launch, whatever the number of sources, and nothing kept for a backward.

Same equations as `attn_res_read`, with the sum before and the norm after it. At one to 64 tokens a launch and the wait
for memory are all there is. So a token has a program of many warps, each group of sources is on its way before the
first of them is used, and the addresses travel as arguments: a CUDA graph keeps those, and no table is copied to the
device. Every program writes them to a scratch table of its own, since arguments cannot be indexed at run time.
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
    multiply_rows,
    scale_row,
    square_and_dot,
    store_row,
)

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_finished", "num_tokens", "read_scale"])
def attn_res_decode_kernel(
    finished_ptrs,
    newest_ptr,
    table_ptr,
    update_ptr,
    weight_ptr,
    norm_weight_ptr,
    out_ptr,
    sum_ptr,
    read_scale,
    num_finished,
    num_tokens,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Reads all sources of one token.

    Args:
        finished_ptrs: tuple of matrices [tokens, D], the sources but the newest; any follow the first `num_finished`.
        newest_ptr: [tokens, D], the newest source.
        table_ptr: [tokens, length of the tuple] of int64, overwritten.
        update_ptr: [tokens, D] or None; its sum with the newest source, rounded, takes that one's place.
        weight_ptr: w [D], of the dtype of the sums.
        norm_weight_ptr: [D] or None.
        out_ptr: [tokens, D].
        sum_ptr: [tokens, D] for the sum of the newest source and the update, or None.
        GROUP: sources loaded together.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    tokens = token + tl.arange(0, 1)
    in_range = tokens < num_tokens
    table = table_ptr + token * len(finished_ptrs)
    for i in tl.static_range(len(finished_ptrs)):
        tl.store(table + i, finished_ptrs[i].to(tl.int64))
    tl.debug_barrier()
    weight = load_vector(weight_ptr, D, BLOCK_D, dtype)
    value = load_row(newest_ptr, tokens, in_range, D, 1, BLOCK_D, dtype)
    if update_ptr is not None:
        update = load_row(update_ptr, tokens, in_range, D, 1, BLOCK_D, dtype)
        rounded = convert_row(add_rows(value, update), sum_ptr.dtype.element_ty)
        store_row(sum_ptr, rounded, tokens, in_range, D, 1, BLOCK_D)
        value = convert_row(rounded, dtype)
    square, dot = square_and_dot(value, weight)
    top = dot * tl.rsqrt(square * (1.0 / D) + EPS)
    total = tl.full([1], 1.0, dtype)
    mix = value
    for first in range(0, num_finished, GROUP):
        raws = ()
        for j in tl.static_range(GROUP):
            # Past the end the last one is loaded again, from cache, and weighs nothing.
            address = tl.load(table + tl.minimum(first + j, num_finished - 1))
            source_ptr = tl.multiple_of(address, 16).to(newest_ptr.dtype)
            raws += (load_row(source_ptr, tokens, in_range, D, 1, BLOCK_D),)
        for j in tl.static_range(GROUP):
            value = convert_row(raws[j], dtype)
            square, dot = square_and_dot(value, weight)
            logit = dot * tl.rsqrt(square * (1.0 / D) + EPS)
            logit = tl.where(first + j < num_finished, logit, float("-inf"))
            new_top = tl.maximum(top, logit)
            shrink = tl.exp(top - new_top)
            share = tl.exp(logit - new_top)
            top = new_top
            total = total * shrink + share
            mix = add_scaled(scale_row(mix, shrink), value, share)
    h = scale_row(mix, read_scale / total)
    if norm_weight_ptr is not None:
        norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D, dtype)
        h = multiply_rows(scale_row(h, tl.rsqrt(dot_rows(h, h) * (1.0 / D) + NORM_EPS)), norm_weight)
    store_row(out_ptr, h, tokens, in_range, D, 1, BLOCK_D)
