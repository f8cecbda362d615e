"""Count the matrices [tokens, D] that kernels load and store, in Triton's interpreter.

Matrices are float16 and everything else is wider: statistics, weights and addresses. Two float32 arguments need care:
`carry_ptr`, the sum that one launch of a long read leaves to the next, counts as two matrices, and vectors of weights
and tables of addresses are no statistics.

Issued accesses are all that a kernel executes. Distinct ones are those of different addresses within a launch, the
least that memory must deliver if a cache serves the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

_MATRIX_BYTES = 2
_CARRY = "carry_ptr"
_NO_STATISTICS = ("weight", "table")


class Traffic(NamedTuple):
    """Numbers of matrices [tokens, D] that one launch, or several, have loaded and stored."""

    issued_loads: Fraction
    distinct_loads: Fraction
    issued_stores: Fraction
    distinct_stores: Fraction

    def __add__(self, other: Any) -> Traffic:
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))


NO_TRAFFIC = Traffic(*[Fraction(0)] * 4)


class Launch:
    """What one launch of a kernel accesses.

    Attributes:
        name: name of the kernel.
    """

    def __init__(self, name: str, arguments: dict[str, Any]):
        self.name = name
        # Start and end of every wide tensor argument.
        self._wide = {
            key: (value.data_ptr(), value.data_ptr() + value.numel() * value.element_size())
            for key, value in arguments.items()
            if isinstance(value, Tensor) and value.element_size() > _MATRIX_BYTES
        }
        self._issued: Counter[str] = Counter()
        self._addresses: dict[str, list[numpy.ndarray]] = {"load": [], "store": [], "statistics": []}
        self._distinct: dict[str, int] = {}

    def add(self, access: str, pointers: Any, mask: Any) -> None:
        """Add the accesses of one instruction: a block of pointers and its mask."""
        addresses, is_accessed = numpy.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[is_accessed.astype(bool)]
        num_bytes = pointers.get_element_ty().primitive_bitwidth // 8
        if addresses.size == 0:
            return
        if num_bytes != _MATRIX_BYTES:
            argument = self._argument_at(int(addresses.min()))
            if argument != _CARRY:
                if argument is not None and not any(word in argument for word in _NO_STATISTICS):
                    self._addresses["statistics"].append(addresses.ravel().copy())
                return
            addresses = numpy.concatenate([addresses + offset for offset in range(0, num_bytes, _MATRIX_BYTES)])
        self._issued[access] += addresses.size
        self._addresses[access].append(addresses.ravel().copy())

    def _argument_at(self, address: int) -> str | None:
        return next((name for name, (start, end) in self._wide.items() if start <= address < end), None)

    def traffic(self, num_elements: int) -> Traffic:
        """Return the accesses in matrices of `num_elements`."""
        numbers = []
        for access in ("load", "store"):
            numbers += [Fraction(self._issued[access], num_elements), Fraction(self._distinct[access], num_elements)]
        return Traffic(*numbers)

    def statistics(self, num_tokens: int) -> Fraction:
        """Return how many numbers per token are loaded or stored, each once."""
        return Fraction(self._distinct["statistics"], num_tokens)

    def finish(self) -> None:
        """Count the addresses, and forget them."""
        for access, blocks in self._addresses.items():
            self._distinct[access] = numpy.unique(numpy.concatenate(blocks)).size if blocks else 0
        self._addresses.clear()


@contextmanager
def metered_kernels() -> Iterator[list]:
    """Yield a list that receives every launch in the context."""
    launches: list = []
    running: list[Launch] = []
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, grid.__call__

    def metered_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        running[-1].add("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def metered_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        running[-1].add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    def metered_call(self: Any, *arguments: Any, **options: Any) -> Any:
        launch = Launch(self.fn.__name__, dict(zip(self.arg_names, arguments, strict=False)) | options)
        launches.append(launch)
        running.append(launch)
        # The interpreter itself uses torch.
        with _disable_current_modes():
            result = call(self, *arguments, **options)
        running.pop().finish()
        return result

    replaced = ((builder, "create_masked_load", metered_load), (builder, "create_masked_store", metered_store))
    for owner, name, function in (*replaced, (grid, "__call__", metered_call)):
        setattr(owner, name, function)
    try:
        yield launches
    finally:
        for owner, name, function in (
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (grid, "__call__", call),
        ):
            setattr(owner, name, function)
