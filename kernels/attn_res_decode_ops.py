"""AttnRes reads of a few tokens: when they take the kernel of `attn_res_decode`, and its launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attn_res_configs import decode_config
from .attn_res_decode import attn_res_decode_kernel
from .launches import aligned, on_device

#: Reads of more tokens have programs enough for one per token and fewer warps.
MAX_DECODE_TOKENS = 64
# A binary serves as many sources as its tuple of pointers is long; addresses of more would not fit in the arguments.
_TUPLE_LENGTHS = (8, 32, 128, 384)


def is_decode(sources: Sequence[Tensor]) -> bool:
    """Whether these are few tokens, and no more sources than the arguments of a kernel hold."""
    first = sources[0]
    return len(sources) <= _TUPLE_LENGTHS[-1] + 1 and first.numel() <= MAX_DECODE_TOKENS * first.shape[-1]


def decode(
    sources: list[Tensor],
    score_weight: Tensor,
    eps: float,
    read_scale: float,
    update: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the read and the sum of the newest source and the update (empty without one)."""
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
