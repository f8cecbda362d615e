"""Choice of an op's implementation: one `resolve` function for every op of the package."""

from collections.abc import Callable

import torch

IMPLS = ("auto", "torch", "triton")

# op name -> Triton implementation, with the signature of the torch one it replaces.
TRITON_OPS: dict[str, Callable] = {}


def resolve(op_name: str, impl: str, device: torch.device, torch_impl: Callable) -> Callable:
    """Returns the function that runs `op_name` on `device`.

    `"auto"` takes the Triton implementation on a CUDA or HIP device when there is one, and torch otherwise. An
    explicit choice is kept: `"triton"` raises rather than fall back.

    Args:
        op_name: key of the op in `TRITON_OPS`.
        impl: `"auto"`, `"torch"` or `"triton"`.
        device: device of the op's inputs. HIP devices also have the type `"cuda"`.
        torch_impl: the torch implementation of the op.
    """
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {IMPLS}, got {impl!r}")
    triton_impl = TRITON_OPS.get(op_name)
    if triton_impl is None:
        if impl == "triton":
            raise RuntimeError(
                f"impl='triton': there is no Triton implementation of {op_name!r}; use 'auto' or 'torch'"
            )
        return torch_impl
    use_triton = impl == "triton" or (impl == "auto" and device.type == "cuda")
    return triton_impl if use_triton else torch_impl
