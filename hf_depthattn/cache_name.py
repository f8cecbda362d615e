"""The name under which transformers hands the cache to models, layers and attention modules, which 5.24 changed."""

import inspect

from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification

_forward_arguments = inspect.signature(GenericForSequenceClassification.forward).parameters

#: `"cache"` since transformers 5.24, `"past_key_values"` before.
CACHE_NAME = "cache" if "cache" in _forward_arguments else "past_key_values"


def cache_arguments(cache: Cache | None, past_key_values: Cache | None) -> dict[str, Cache | None]:
    """The cache as keyword arguments for the host: under one name, since with two of them it warns at every call.

    Args:
        cache: what came in under the new name.
        past_key_values: what came in under the old name.
    """
    if CACHE_NAME == "cache":
        return {"cache": past_key_values if cache is None else cache}
    # Before 5.24 `cache` is the paged cache of continuous batching, which goes to the attention function as it is.
    return {"past_key_values": past_key_values, **({} if cache is None else {"cache": cache})}
