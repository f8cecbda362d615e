"""What the GPU suite is made of: cases, and the rows that are compared in a case.

A case is a problem of one shape and the rows that solve it: ours, peers, and what they are measured against. Adding an
op is one `Row` in the tuple of its case; adding a shape is one `Case`. A row whose function raises `Absent` is listed
with the reason and holds nothing up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"


class Absent(Exception):
    """A row cannot run here; the message says why."""


class Problem(Protocol):
    """Inputs of one case."""

    cotangents: list[Tensor]

    def leaves(self) -> dict[str, list[Tensor]]:
        """What gets a gradient, by name; parity is checked name by name."""

    def double(self) -> Problem:
        """The same numbers in float64."""


class Row(NamedTuple):
    """One way to solve a problem.

    Attributes:
        name: unique in its case.
        kind: `"ours"`, `"peer"`, or `"base"` for what the mechanism is an addition to, which solves something else.
        solve: problem -> outputs, differentiable by autograd. Raises `Absent` where it cannot run.
        checks_parity: compare with the reference before timing.
        slow_to_compile: comes last, with the time that is left.
        elsewhere: in place of `solve`, for rows in a process of their own: case -> `{"parity": ..., "passes": ...}` as
            `gpu_run` makes them.
    """

    name: str
    kind: str
    solve: Callable[[Any], Sequence[Tensor]] | None
    checks_parity: bool = True
    slow_to_compile: bool = False
    elsewhere: Callable[[Case], dict] | None = None


class Case(NamedTuple):
    """One shape of one problem.

    Attributes:
        name: unique; `--only` takes a part of it.
        part: of the suite.
        setting: the shape, as JSON has it; passed to `make`.
        parity_setting: what differs for parity: fewer tokens, the same channels, so that the same kernels run.
        make: setting, dtype and device -> problem.
        reference: problem -> outputs, in float64.
        rows: in the order of the table.
        passes: `FORWARD`, `FORWARD_BACKWARD`.
        floors: pass -> bytes that memory must carry at least, and how they are counted.
        rounding: key of `gpu_parity.BOUNDS`.
        in_graph: timed as a CUDA graph where it can be: with few tokens, launches are what costs.
        floor_is_extra: floors are of what comes on top of the first base row.
    """

    name: str
    part: str
    setting: dict
    parity_setting: dict
    make: Callable[[dict, torch.dtype, torch.device], Problem]
    reference: Callable[[Any], Sequence[Tensor]]
    rows: tuple[Row, ...]
    passes: tuple[str, ...]
    floors: dict[str, tuple[int, str]]
    rounding: str = "op"
    in_graph: bool = False
    floor_is_extra: bool = False


def optional(module: str, attribute: str) -> Any:
    """An attribute of a module that need not be there.

    Raises:
        Absent: with the error of the import.
    """
    try:
        return getattr(importlib.import_module(module), attribute)
    # A wheel of kernels may fail in other ways too: ValueError where Triton refuses its autotuning keys, for example.
    except (ImportError, AttributeError, ValueError, RuntimeError, TypeError, OSError) as error:
        raise Absent(f"{module}.{attribute}: {type(error).__name__}: {error}") from error


def gradients(outputs: Sequence[Tensor], problem: Problem) -> dict[str, list[Tensor]]:
    """Gradients of the leaves, by name; zeros where nothing came."""
    leaves = problem.leaves()
    flat = [leaf for group in leaves.values() for leaf in group]
    found = iter(torch.autograd.grad(outputs, flat, problem.cotangents, allow_unused=True))
    return {
        name: [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(group, found, strict=False)]
        for name, group in leaves.items()
    }
