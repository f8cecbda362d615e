"""The registry of ops, and the selection of their implementations."""

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
    """An op and its implementations, which have the same signature.

    Attributes:
        name: its key in `OPS`.
        torch_impl: the torch implementation, which supports all inputs.
        triton_impl: the Triton implementation, or `None`.
        limit: function of the inputs that returns why the Triton implementation does not support them, or `None` if
            it does. Without this function, it supports all inputs.
    """

    name: str
    torch_impl: Impl
    triton_impl: Impl | None = None
    limit: Callable[..., str | None] | None = None


#: Name -> op. Each op is registered in the file that defines it; tests replace entries.
OPS: dict[str, Op[Any]] = {}


def needs_reference() -> bool:
    """Return whether references must be used instead of ops.

    An exported program must run without this package and its ops, and ops do not support the transforms of
    `torch.func`.
    """
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def register(op: Op[Impl]) -> Op[Impl]:
    """Add an op to the registry, replacing one of the same name, and return it."""
    OPS[op.name] = op
    return op


def resolve(op: Op[Impl], impl: str, device: torch.device, inputs: tuple[Any, ...]) -> Impl:
    """Return the implementation of an op for inputs on `device`.

    `"auto"` selects the Triton implementation on a CUDA or HIP device if it supports the inputs, and torch otherwise.
    `"triton"` never falls back to torch.

    Args:
        op: the op; the entry of its name in the registry is used.
        impl: `"auto"`, `"torch"` or `"triton"`.
        device: device of the op's inputs. HIP devices also have the type `"cuda"`.
        inputs: arguments of `op.limit`.

    Raises:
        ValueError: if `impl` is another value.
        RuntimeError: if `impl` is `"triton"` and there is no Triton implementation for the inputs.
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
