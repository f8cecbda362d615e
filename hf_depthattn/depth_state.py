"""The state that decoder layers pass to each other in place of `hidden_states`."""

from typing import NamedTuple, NoReturn

from torch import Tensor


class DepthState(NamedTuple):
    """The state between decoder layers, in place of `hidden_states`: a pytree of tensors, never changed in place.

    Successive states share their tensors: a model with N sources keeps N tensors, not N(N+1)/2.

    Attributes:
        sources: finished sources, oldest first, the embedding at 0, each `[B, T, D]`.
        partial: running sum of the open block, `[B, T, D]` (the embedding before site 0).
        depth_keys: keys of MoDA's slots, oldest first, each `[B, Hk, T, d]`; connections leave them unchanged.
        depth_values: values of the slots, each `[B, Hk, T, dv]`.
    """

    sources: tuple[Tensor, ...]
    partial: Tensor
    depth_keys: tuple[Tensor, ...] = ()
    depth_values: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"'DepthState' object has no attribute {name!r}: only the last decoder layer returns a tensor, "
            "the others return a DepthState. (Truncating `model.layers` is not possible.) To run layers one by one, "
            "use `hf_depthattn.integrations.layerwise.layers_that_pass_tensors`."
        )
