"""Paged caches (continuous batching): one row packs the new tokens of many requests, whose keys are in pages.

MoDA needs all keys and values of such a call, and those of its own tokens, which become a slot. transformers 5.24
updates the cache before it calls the attention function; in earlier versions the function does it.
"""

import inspect

import torch
from torch import Tensor

#: An argument that attention functions get only with a paged cache, in all versions of transformers.
_ONLY_WITH_PAGES = "write_index"


def is_paged(kwargs: dict) -> bool:
    """Return whether the keyword arguments of an attention function are those with a paged cache."""
    return _ONLY_WITH_PAGES in kwargs


def paged_keys_and_values(
    key: Tensor, value: Tensor, num_tokens: int, layer_idx: int, kwargs: dict
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return keys and values of all requests, cached and new, and those of this call's own tokens.

    Args:
        key: keys as passed to the attention function, [1, Hk, S, d]; including the cache since transformers 5.24.
        value: values as passed to the attention function, [1, Hk, S, dv].
        num_tokens: number of tokens of this call, T.
        layer_idx: index of the layer.
        kwargs: keyword arguments of the attention function; the cache is removed from them.

    Returns:
        All keys and values [1, Hk, S, d], and those of this call [1, Hk, T, d].
    """
    cache = kwargs.pop("cache", None)
    if cache is None:
        positions = _own_positions(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], num_tokens, key.shape[2])
        return key, value, (key.index_select(2, positions), value.index_select(2, positions))
    own = (key, value)
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(key, value, layer_idx, kwargs=kwargs)
    else:
        # In transformers 5.17, `update` returns [S, Hk, d].
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in cache.update(key, value, layer_idx, **indices))
    return key, value, own


def _own_positions(query_ends: Tensor, key_ends: Tensor, num_tokens: int, num_keys: int) -> Tensor:
    """Return the indices of the keys of a call's own tokens, which come last among the keys of each request.

    Args:
        query_ends: cumulative number of new tokens, starting with 0, [requests + 1].
        key_ends: cumulative number of keys, starting with 0, [requests + 1].
        num_tokens: T; tokens after the last request are padding and get arbitrary indices.
        num_keys: S.
    """
    tokens = torch.arange(num_tokens, device=query_ends.device)
    request_end = torch.searchsorted(query_ends.contiguous(), tokens, right=True).clamp_(max=query_ends.shape[0] - 1)
    return (tokens + (key_ends - query_ends)[request_end]).clamp_(max=num_keys - 1)
