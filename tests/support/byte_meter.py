"""Count the matrices [tokens, D] that kernels load and store, in Triton's interpreter.

Tests run in float16: accesses of 2 bytes are those of matrices, wider ones of statistics, weights and addresses.

Issued loads are all that a kernel executes. Distinct ones are those of different addresses within a launch, the least
that memory must deliver if a cache serves the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy
import pytest
from triton.runtime import interpreter

_MATRIX_BYTES = 2


class Traffic(NamedTuple):
    """Numbers of matrices [tokens, D] that one launch, or several, have loaded and stored."""

    issued_loads: Fraction
    distinct_loads: Fraction
    issued_stores: Fraction
    distinct_stores: Fraction

    def __add__(self, other: Any) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


class Launch:
    """The 16-bit elements that one launch of a kernel accesses.

    Attributes:
        kernel: name of the kernel.
    """

    def __init__(self, kernel: str):
        self.kernel = kernel
        self._issued: Counter[str] = Counter()
        self._addresses: dict[str, list[numpy.ndarray]] = {"load": [], "store": []}

    def add(self, access: str, pointers: Any, mask: Any) -> None:
        """Add the accesses of one instruction: a block of pointers and its mask."""
        if pointers.get_element_ty().primitive_bitwidth != 8 * _MATRIX_BYTES:
            return
        addresses, is_accessed = numpy.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[is_accessed.astype(bool)]
        self._issued[access] += addresses.size
        self._addresses[access].append(addresses.ravel().copy())

    def traffic(self, num_elements: int) -> Traffic:
        """Return the accesses in matrices of `num_elements`."""
        numbers = []
        for access, blocks in self._addresses.items():
            distinct = numpy.unique(numpy.concatenate(blocks)).size if blocks else 0
            numbers += [Fraction(self._issued[access], num_elements), Fraction(distinct, num_elements)]
        return Traffic(*numbers)


@contextmanager
def metered() -> Iterator[list[Launch]]:
    """Yield a list that receives every launch in the context."""
    launches: list[Launch] = []
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, grid.__call__

    def metered_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].add("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def metered_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def metered_call(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        return call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", metered_load)
        patch.setattr(builder, "create_masked_store", metered_store)
        patch.setattr(grid, "__call__", metered_call)
        yield launches
