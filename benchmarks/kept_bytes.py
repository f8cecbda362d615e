"""What a forward pass keeps in memory for backward, in bytes: exact, and the same in every run."""

import gc
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that a forward pass makes and that live on when it is over, each storage once.

    Without gradient checkpointing these are the tensors that autograd saved, and the result. With it they are what
    checkpoints hold, which hooks on saved tensors do not see where it is inside a tuple. They depend on shapes and
    kernels alone, not on how memory is allocated.

    Args:
        forward: runs the forward pass and returns its result, which keeps the graph.
        leave_out: tensors that are not counted: parameters and inputs, of which operations return views.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
    with _Storages() as storages:
        result = forward()
    gc.collect()
    num_bytes = storages.living(excluded)
    # Up to here the result had to keep the graph.
    del result
    return num_bytes


class _Storages(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                # A later storage may get the address of one that is gone, and then replaces it here.
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), storage.data_ptr())
        return result

    def living(self, excluded: set[int]) -> int:
        """Bytes of the storages that are still there, without those at excluded addresses."""
        return sum(
            num_bytes
            for reference, num_bytes, address in self._seen.values()
            if address not in excluded and not reference.expired()
        )
