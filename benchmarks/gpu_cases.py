"""Cases of the GPU suite, and the rows that are compared in a case.

A case is a problem of one shape with the rows that solve it: ours, peers and baselines. To add an op, add a `Row` to
its case; to add a shape, add a `Case`. A row whose function raises `Absent` is listed with the reason and skipped.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"


class Absent(Exception):
    """Raised if a row cannot run here; the message is the reason."""


class Problem(Protocol):
    """Inputs of a case."""

    cotangents: list[Tensor]

    def leaves(self) -> dict[str, list[Tensor]]:
        """Return the tensors that require gradients, by the names under which parity is checked."""

    def double(self) -> Problem:
        """Return a copy in float64."""


class Row(NamedTuple):
    """One implementation that solves a problem.

    Attributes:
        name: name, unique in its case.
        kind: `"ours"`, `"peer"`, or `"base"` for a baseline without the mechanism, which solves another problem.
        solve: function from a problem to outputs with gradients; raises `Absent` if it cannot run.
        checks_parity: whether to compare with the reference before timing.
        slow_to_compile: whether to run last, in the remaining time.
        elsewhere: replaces `solve` for rows in a separate process: function from a case to `{"parity": ..., "passes":
            ...}` as in `gpu_run`.
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
        name: unique name, matched by `--only`.
        part: part of the suite.
        setting: the shape as JSON values, passed to `make`.
        parity_setting: changes of the setting for parity: fewer tokens, but the same channels and kernels.
        make: function from setting, dtype and device to a problem.
        reference: function from a problem to outputs, run in float64.
        rows: rows in the order of the table.
        passes: `FORWARD`, `FORWARD_BACKWARD`.
        floors: for each pass, the least number of bytes that must be moved, and its formula.
        rounding: key of `gpu_parity.BOUNDS`.
        in_graph: whether to time as a CUDA graph if possible, since launches dominate with few tokens.
        floor_is_extra: whether floors count only the cost in addition to the first base row.
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
    """Import an attribute of an optional module.

    Raises:
        Absent: if the import fails.
    """
    try:
        return getattr(importlib.import_module(module), attribute)
    # Packages of kernels may also fail in other ways, e.g. with ValueError if Triton rejects autotuning keys.
    except (ImportError, AttributeError, ValueError, RuntimeError, TypeError, OSError) as error:
        raise Absent(f"{module}.{attribute}: {type(error).__name__}: {error}") from error


def gradients(outputs: Sequence[Tensor], problem: Problem) -> dict[str, list[Tensor]]:
    """Return the gradients of the leaves by name; zeros where there is none."""
    leaves = problem.leaves()
    flat = [leaf for group in leaves.values() for leaf in group]
    found = iter(torch.autograd.grad(outputs, flat, problem.cotangents, allow_unused=True))
    return {
        name: [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(group, found, strict=False)]
        for name, group in leaves.items()
    }
