"""Choice of an op's implementation: the registry of ops, and one `resolve` function for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .kernels.triton_runtime import triton_version

Impl = TypeVar("Impl")

IMPLS = ("auto", "torch", "triton")

_HAS_TRITON = triton_version() is not None


@dataclass(frozen=True)
class Op(Generic[Impl]):
    """An op and its implementations, which have one signature.

    Attributes:
        name: its key in `OPS`.
        torch_impl: the implementation in torch; it takes everything.
        triton_impl: the one in Triton, `None` if there is none.
        limit: takes the inputs given to `resolve` and tells why the Triton implementation cannot take them; `None` if
            it can. Without a limit it takes everything.
    """

    name: str
    torch_impl: Impl
    triton_impl: Impl | None = None
    limit: Callable[..., str | None] | None = None


#: The registry: every op by its name. Each registers in the file that defines it; tests replace rows here.
OPS: dict[str, Op[Any]] = {}


def register(op: Op[Impl]) -> Op[Impl]:
    """Enters an op into the registry and returns it; a file that is run again replaces its rows."""
    OPS[op.name] = op
    return op


def resolve(op: Op[Impl], impl: str, device: torch.device, inputs: tuple[Any, ...]) -> Impl:
    """Returns the implementation of an op for inputs on `device`.

    `"auto"` takes the Triton implementation on a CUDA or HIP device when there is one that takes these inputs, and
    torch otherwise. An explicit choice is kept: `"triton"` raises rather than fall back.

    Args:
        op: the op; the registry's row of its name is used.
        impl: `"auto"`, `"torch"` or `"triton"`.
        device: device of the op's inputs. HIP devices also have the type `"cuda"`.
        inputs: arguments for the op's limit.
    """
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {IMPLS}, got {impl!r}")
    row: Op[Impl] = OPS[op.name]
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return row.torch_impl
    if row.triton_impl is None or not _HAS_TRITON:
        if impl == "triton":
            reason = "" if _HAS_TRITON else " (the package `triton` cannot be imported)"
            raise RuntimeError(
                f"impl='triton': there is no Triton implementation of {row.name!r}{reason}; use 'auto' or 'torch'"
            )
        return row.torch_impl
    limit = None if row.limit is None else row.limit(*inputs)
    if limit is None:
        return row.triton_impl
    if impl == "triton":
        raise RuntimeError(f"impl='triton': {row.name!r} has no kernel for these inputs: {limit}")
    return row.torch_impl
