"""Paged caches (continuous batching): one row packs the new tokens of many requests, whose keys are in pages.

MoDA needs two things of such a call: the keys and values that attention sees, and among them those of the call's own
tokens, which become a depth slot. transformers 5.24 updates the cache before it calls the attention function, versions
before leave that to the function.
"""

import inspect

import torch
from torch import Tensor

#: An argument that attention functions get with a paged cache only, in every version of transformers.
_ONLY_WITH_PAGES = "write_index"


def is_paged(kwargs: dict) -> bool:
    """Whether the keyword arguments of an attention function come with a paged cache."""
    return _ONLY_WITH_PAGES in kwargs


def paged_keys_and_values(
    key: Tensor, value: Tensor, num_tokens: int, layer_idx: int, kwargs: dict
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Keys and values of all requests, cached and new, and those of this call's own tokens.

    Args:
        key: [1, Hk, S, d], as the attention function got it: since transformers 5.24 with the cached ones.
        value: [1, Hk, S, dv].
        num_tokens: tokens of this call, T.
        layer_idx: number of the layer.
        kwargs: of the attention function; the cache is taken out.

    Returns:
        Keys and values [1, Hk, S, d], and the own ones [1, Hk, T, d].
    """
    cache = kwargs.pop("cache", None)
    if cache is None:
        positions = _own_positions(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], num_tokens, key.shape[2])
        return key, value, (key.index_select(2, positions), value.index_select(2, positions))
    own = (key, value)
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(key, value, layer_idx, kwargs=kwargs)
    else:
        # In transformers 5.17 it returns [S, Hk, d].
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in cache.update(key, value, layer_idx, **indices))
    return key, value, own


def _own_positions(query_ends: Tensor, key_ends: Tensor, num_tokens: int, num_keys: int) -> Tensor:
    """Where the keys of a call's own tokens stand: those of a request come last among its keys.

    Args:
        query_ends: [requests + 1], the number of new tokens before every request, and in all.
        key_ends: [requests + 1], the same for keys.
        num_tokens: T; tokens after the last request are padding and get any position.
        num_keys: S.
    """
    tokens = torch.arange(num_tokens, device=query_ends.device)
    request_end = torch.searchsorted(query_ends.contiguous(), tokens, right=True).clamp_(max=query_ends.shape[0] - 1)
    return (tokens + (key_ends - query_ends)[request_end]).clamp_(max=num_keys - 1)
