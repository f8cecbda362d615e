r"""AttnRes read for a few tokens: one launch, whatever the number of sources, and nothing kept for a backward.

Same equations as `attn_res_read`, with the sum before and the norm after it. At one to 64 tokens a launch and the wait
for memory are all there is. So a token has a program of many warps, each group of sources is on its way before the
first of them is used, and the addresses travel as arguments: a CUDA graph keeps those, and no table is copied to the
device. Every program writes them to a scratch table of its own, since arguments cannot be indexed at run time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attn_res_configs import decode_config
from .attn_res_inputs import ReadInputs
from .launches import aligned, on_device
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

#: Reads of more tokens have programs enough for one per token and fewer warps.
MAX_DECODE_TOKENS = 64
# A binary serves as many sources as its tuple of pointers is long; addresses of more would not fit in the arguments.
_TUPLE_LENGTHS = (8, 32, 128, 384)


def is_decode(sources: Sequence[Tensor]) -> bool:
    """Whether these are few tokens, and no more sources than the arguments of a kernel hold."""
    first = sources[0]
    return len(sources) <= _TUPLE_LENGTHS[-1] + 1 and first.numel() <= MAX_DECODE_TOKENS * first.shape[-1]


def decode(inputs: ReadInputs) -> tuple[Tensor, Tensor]:
    """Returns the read and the sum of the newest source and the update (empty without one)."""
    sources, score_weight, eps, read_scale, update, norm_weight, norm_eps = inputs
    num_channels = sources[0].shape[-1]
    num_tokens = sources[0].numel() // num_channels
    rows = [aligned(source) for source in sources]
    finished, newest = rows[:-1], rows[-1]
    out = torch.empty_like(newest)
    total = torch.empty_like(newest) if update is not None else newest.new_empty(0)
    if num_tokens == 0:
        return out, total
    length = next(length for length in _TUPLE_LENGTHS if len(finished) <= length)
    table = torch.empty(num_tokens, length, dtype=torch.int64, device=newest.device)
    config = decode_config(num_channels)
    with on_device(newest):
        attn_res_decode_kernel[(num_tokens,)](
            (*finished, *[newest] * (length - len(finished))),
            newest,
            table,
            None if update is None else update.contiguous(),
            score_weight.contiguous(),
            None if norm_weight is None else norm_weight.contiguous(),
            out,
            None if update is None else total,
            read_scale,
            len(finished),
            num_tokens,
            EPS=eps,
            NORM_EPS=norm_eps,
            **config.launch_options(num_channels),
        )
    return out, total


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
