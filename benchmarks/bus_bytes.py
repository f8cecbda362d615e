"""Exact count of what the collective operations of a process move over the bus."""

from __future__ import annotations

from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_MESSAGE = ("wait_tensor", "_wrap_tensor_autograd")


class BusElements(TorchDispatchMode):
    """Counts the elements that a process sends in collectives, as ring algorithms send them.

    With P processes, an all-reduce of n elements sends 2 n (P - 1) / P, an all-gather to n elements and a
    reduce-scatter of n elements send n (P - 1) / P. Any other collective raises an error.

    Attributes:
        count: the number of elements so far.
        calls: name of a collective -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor then runs its collectives as operations on tensors, which come here again.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and name not in _NO_MESSAGE:
            self._add(name.rstrip("_"), [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], result)
        return result

    def _add(self, name: str, inputs: list[Tensor], result: object) -> None:
        num_processes = dist.get_world_size()
        if "reduce_scatter" in name:
            num_elements, times = inputs[-1].numel(), 1
        elif name in ("all_reduce", "allreduce"):
            num_elements, times = inputs[0].numel(), 2
        elif name == "all_gather_into_tensor":
            num_elements, times = prod(result.shape) if isinstance(result, Tensor) else 0, 1
        else:
            raise NotImplementedError(f"{name}: a collective that this counter does not know")
        self.count += times * num_elements * (num_processes - 1) / num_processes
        self.calls[name] = self.calls.get(name, 0) + 1
