"""Count the matrices [tokens, D] that torch operations load and store.

Every operation that is not a view loads its inputs and stores its results once; operations of this package are opened.
Tensors are told apart by their sizes, so the numbers of tokens and channels must not divide any other size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import torch
from kernel_bytes import Traffic
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMESPACE = "depthattn"
# Operations that overwrite a tensor without loading it, or load nothing.
_OVERWRITING = ("copy_", "zero_", "fill_")
_UNINITIALISED = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_CONSTANT = ("zeros", "new_zeros", "zeros_like", "ones", "new_ones", "ones_like", "full", "full_like")


class TorchOp:
    """What one operation loads and stores, in elements of matrices and numbers per token."""

    def __init__(self, name: str, loads: Fraction, stores: Fraction, statistics: Fraction):
        self.name, self.loads, self.stores, self._statistics = name, loads, stores, statistics

    def traffic(self, num_elements: int) -> Traffic:
        """Return the accesses in matrices of `num_elements`."""
        loads, stores = self.loads / num_elements, self.stores / num_elements
        return Traffic(loads, loads, stores, stores)

    def statistics(self, num_tokens: int) -> Fraction:
        """Return how many numbers per token are loaded or stored."""
        return self._statistics / num_tokens


class TorchBytes(TorchDispatchMode):
    """Appends every operation that moves matrices or statistics to a list.

    Args:
        events: the list.
        num_tokens: number of tokens.
        num_channels: D.
        dtype: dtype of the matrices.
    """

    def __init__(self, events: list, num_tokens: int, num_channels: int, dtype: torch.dtype):
        super().__init__()
        self.events, self.num_tokens, self.num_channels, self.dtype = events, num_tokens, num_channels, dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")
        if name[0] == _NAMESPACE:
            with self, torch.no_grad():
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        loaded, stored = _accessed(func, args, kwargs, result)
        of_loads, of_stores = self._elements(loaded), self._elements(stored)
        if any((*of_loads, *of_stores)):
            statistics = of_loads[1] + of_stores[1]
            self.events.append(TorchOp(name[-1], of_loads[0], of_stores[0], statistics))
        return result

    def _elements(self, tensors: Iterable[Tensor]) -> tuple[Fraction, Fraction]:
        """Return the elements of all matrices and of all statistics; weights are neither."""
        of_matrices = of_statistics = Fraction(0)
        for tensor in filter(torch.is_floating_point, tensors):
            # A broadcast dimension is in memory once.
            number = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
            has_channels = any(size and size % self.num_channels == 0 for size in tensor.shape)
            if tensor.dtype == self.dtype and has_channels and number % (self.num_tokens * self.num_channels) == 0:
                of_matrices += number
            elif not has_channels and number % self.num_tokens == 0:
                of_statistics += number
        return of_matrices, of_statistics


def _accessed(func: Any, args: tuple, kwargs: dict, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation loads and those that it stores, each once."""
    schema, name = func._schema, func._schema.name.split("::")[-1]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if is_view or name in _UNINITIALISED or name == "_unsafe_view":
        return [], []
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    loaded: list[Tensor] = []
    stored: list[Tensor] = []
    for argument in schema.arguments:
        tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if isinstance(leaf, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            stored += tensors
        if name not in _CONSTANT and not (is_written and (argument.kwarg_only or name in _OVERWRITING)):
            loaded += tensors
    if all(r.alias_info is None for r in schema.returns):
        stored += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return list({id(tensor): tensor for tensor in loaded}.values()), stored
