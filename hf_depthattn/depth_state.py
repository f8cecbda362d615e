"""The state that decoder layers pass to each other in place of `hidden_states`."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor


class Carried:
    """A value that layers pass on unchanged: a `NamedTuple` whose fields are tensors, tuples of tensors or constants.

    FSDP2 casts the tensors that it finds in a layer's inputs, also within tuples and dicts, to its compute dtype. It
    does not look into other objects, so values in this class stay float32.

    Args:
        value: the value.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Carried":
        """Return a copy on another device; accelerate calls this for a model on several devices.

        Args:
            device: the device.
            non_blocking: as in `torch.Tensor.to`.
        """
        return Carried(self.value._make(_moved(field, device, non_blocking) for field in self.value))


def _moved(field: Any, device: torch.device | str | int, non_blocking: bool) -> Any:
    if isinstance(field, Tensor):
        return field.to(device, non_blocking=non_blocking)
    if isinstance(field, tuple):
        return tuple(_moved(entry, device, non_blocking) for entry in field)
    return field


class DepthState(NamedTuple):
    """The state between decoder layers, in place of `hidden_states`: a pytree of tensors, never changed in place.

    Successive states share their tensors: a model with N sources keeps N tensors, not N(N+1)/2.

    Attributes:
        sources: finished sources, oldest first, the embedding at 0, each `[B, T, D]`.
        partial: running sum of the open block, `[B, T, D]` (the embedding before site 0); without AttnRes the residual
            stream, or all streams `[B, T, n, D]`.
        update: output of the last sublayer, `[B, T, D]`, if it has not been added to `partial` yet: the next read does
            so.
        group: the open group of reads (`attn_res_schedule.ReadGroup`), if there is one.
        write_weights: weights of the streams for the next write, `[B, T, n]`, between the read and the write of a
            sublayer only.
        depth_keys: keys of MoDA's slots, oldest first, each `[B, Hk, T, d]`; connections leave them unchanged.
        depth_values: values of the slots, each `[B, Hk, T, dv]`.
        first_value: with `value_residual`, the output of the first attention layer's `v_proj`, `[B, T, Hk dv]`, from
            that layer on; connections leave it unchanged.
    """

    sources: tuple[Tensor, ...]
    partial: Tensor
    update: Tensor | None = None
    group: Carried | None = None
    write_weights: Tensor | None = None
    depth_keys: tuple[Tensor, ...] = ()
    depth_values: tuple[Tensor, ...] = ()
    first_value: Tensor | None = None

    @property
    def open_block(self) -> Tensor:
        """The sum of the open block with the last update, `[B, T, D]`."""
        return self.partial if self.update is None else self.partial + self.update

    def settled(self) -> "DepthState":
        """Return the same state with the update added and without a group.

        Gradient checkpoints, tools that change a state, and reads of another schedule need this form.
        """
        if self.update is None and self.group is None:
            return self
        return self._replace(partial=self.open_block, update=None, group=None)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"'DepthState' object has no attribute {name!r}: only the last decoder layer returns a tensor, "
            "the others return a DepthState. (Truncating `model.layers` is not possible.) To run layers one by one, "
            "use `hf_depthattn.integrations.layerwise.layers_that_pass_tensors`."
        )
