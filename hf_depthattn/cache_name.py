"""The name of the cache argument of models, layers and attention modules, which changed in transformers 5.24."""

import inspect

from transformers.modeling_layers import GenericForSequenceClassification

_forward_arguments = inspect.signature(GenericForSequenceClassification.forward).parameters

#: `"cache"` since transformers 5.24, `"past_key_values"` before.
CACHE_NAME = "cache" if "cache" in _forward_arguments else "past_key_values"


def cache_of(kwargs: dict):
    """Return the cache among the keyword arguments of a layer, or `None`.

    Args:
        kwargs: the keyword arguments.
    """
    # AFMoE's own name for it in transformers 5.16.
    return kwargs.get(CACHE_NAME, kwargs.get("past_key_value"))
