"""The state that decoder layers pass on in place of `hidden_states`."""

from typing import NamedTuple, NoReturn

from torch import Tensor


class DepthState(NamedTuple):
    """What travels between decoder layers in place of `hidden_states`; a pytree of tensors, never changed in place.

    The tuple grows, its tensors are shared: a model with N sources keeps N tensors, not N(N+1)/2.

    Attributes:
        sources: finished sources, oldest first, the embedding at 0, each `[B, T, D]`.
        partial: running sum of the open block, `[B, T, D]` (the embedding before site 0).
        depth_keys: keys of MoDA's slots, oldest first, each `[B, Hk, T, d]`; connections pass them on.
        depth_values: their values, each `[B, Hk, T, dv]`.
    """

    sources: tuple[Tensor, ...]
    partial: Tensor
    depth_keys: tuple[Tensor, ...] = ()
    depth_values: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"'DepthState' object has no attribute {name!r}. Decoder layers with depth attention pass it on, and only "
            "the last decoder layer returns a tensor, so layers cannot be left out at the end. For tools that run "
            "layers one by one there is `hf_depthattn.layerwise.layers_that_pass_tensors`."
        )
