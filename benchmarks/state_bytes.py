"""The largest depth state of a forward pass, in bytes of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_depthattn.depth_state import DepthState


class PeakState:
    """The largest size of the sources and of what reads prepare for later reads; slots are not counted.

    Attributes:
        num_bytes: bytes of the storages, each counted once; a view counts as the whole that it keeps alive.
    """

    num_bytes = 0

    def __call__(self, layer: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, DepthState):
            return
        group = () if output.group is None else (output.group.value.outs, output.group.value.lses)
        tensors = tree_leaves((output.sources, output.partial, output.update, group))
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.num_bytes = max(self.num_bytes, sum(sizes.values()))


@contextmanager
def peak_state(model: Any) -> Iterator[PeakState]:
    """Measure the state after every layer, in all forward passes inside the context.

    Args:
        model: a model with a decoder.
    """
    peak = PeakState()
    handles = [layer.register_forward_hook(peak) for layer in model.get_decoder().layers]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()
