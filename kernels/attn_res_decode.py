r"""AttnRes read for a few tokens: one launch for any number of sources, without statistics for a backward.

The equations are those of `attn_res_read`. With 1 to 64 tokens, the time is that of the launch and of memory latency.
Therefore a program with many warps processes one token, loads a group of sources before it uses the first of them, and
gets the addresses of sources as arguments: they are part of a captured CUDA graph, and no table is copied to the
device. Arguments cannot be indexed at run time, so every program first writes them to a scratch table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attn_res_configs import decode_config
from .attn_res_inputs import ReadInputs
from .launches import aligned, on_device
from .row_tiles import (
    add_scaled,
    convert_row,
    jit,
    load_row,
    load_vector,
    scale_row,
    square_and_dot,
    store_row,
)

try:
    import triton.language as tl
except ImportError:
    tl = None

#: With more tokens there are enough programs to use fewer warps per token (`attn_res_read`).
MAX_DECODE_TOKENS = 64
# Lengths of the tuple of addresses, each a separate binary; more than the last do not fit in the kernel arguments.
_TUPLE_LENGTHS = (8, 32, 128, 384)


def is_decode(sources: Sequence[Tensor]) -> bool:
    """Return whether there are few tokens, and few enough sources for the kernel arguments."""
    first = sources[0]
    return len(sources) <= _TUPLE_LENGTHS[-1] + 1 and first.numel() <= MAX_DECODE_TOKENS * first.shape[-1]


def decode(inputs: ReadInputs) -> Tensor:
    """Return the read."""
    sources, score_weight, eps, read_scale = inputs
    num_channels = sources[0].shape[-1]
    num_tokens = sources[0].numel() // num_channels
    rows = [aligned(source) for source in sources]
    finished, newest = rows[:-1], rows[-1]
    out = torch.empty_like(newest)
    if num_tokens == 0:
        return out
    length = next(length for length in _TUPLE_LENGTHS if len(finished) <= length)
    table = torch.empty(num_tokens, length, dtype=torch.int64, device=newest.device)
    config = decode_config(num_channels)
    with on_device(newest):
        attn_res_decode_kernel[(num_tokens,)](
            (*finished, *[newest] * (length - len(finished))),
            newest,
            table,
            score_weight.contiguous(),
            out,
            read_scale,
            len(finished),
            num_tokens,
            EPS=eps,
            **config.launch_options(num_channels),
        )
    return out


@jit(do_not_specialize=["num_finished", "num_tokens", "read_scale"])
def attn_res_decode_kernel(
    finished_ptrs,
    newest_ptr,
    table_ptr,
    weight_ptr,
    out_ptr,
    read_scale,
    num_finished,
    num_tokens,
    EPS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Read all sources of one token.

    Args:
        finished_ptrs: tuple of matrices [tokens, D]: all sources except the newest, then arbitrary padding.
        newest_ptr: the newest source, [tokens, D].
        table_ptr: scratch memory, [tokens, length of the tuple], int64.
        weight_ptr: w [D], in the dtype of sums.
        out_ptr: output, [tokens, D].
        GROUP: number of sources loaded together.
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
    square, dot = square_and_dot(value, weight)
    top = dot * tl.rsqrt(square * (1.0 / D) + EPS)
    total = tl.full([1], 1.0, dtype)
    mix = value
    for first in range(0, num_finished, GROUP):
        raws = ()
        for j in tl.static_range(GROUP):
            # Past the end, the last source is loaded again, from cache, with weight zero.
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
    store_row(out_ptr, scale_row(mix, read_scale / total), tokens, in_range, D, 1, BLOCK_D)
