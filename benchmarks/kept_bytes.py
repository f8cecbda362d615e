"""Exact and reproducible count of the bytes that a forward pass keeps for the backward pass."""

import gc
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> int:
    """Count the bytes of all storages that a forward pass creates and that are still alive after it.

    Without gradient checkpointing, these are the tensors saved by autograd, and the result. With it, they are the
    inputs of checkpoints, which saved-tensor hooks miss inside tuples. The count only depends on shapes and kernels,
    not on memory allocation.

    Args:
        forward: runs the forward pass and returns its result, which keeps the graph.
        leave_out: tensors that are not counted, i.e. parameters and inputs, of which operations may return views.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    with _Storages() as storages:
        result = forward()
    gc.collect()
    num_bytes = storages.living(excluded)
    # The result had to keep the graph alive until here.
    del result
    return num_bytes


class _Storages(TorchDispatchMode):
    """Records the storage of every tensor that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # A new storage may reuse the address of a freed one, and then replaces it here.
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), storage.data_ptr())
        return result

    def living(self, excluded: set[int]) -> int:
        """Return the bytes of the storages that are still alive, without those at excluded addresses."""
        return sum(
            num_bytes
            for reference, num_bytes, address in self._seen.values()
            if address not in excluded and not reference.expired()
        )
