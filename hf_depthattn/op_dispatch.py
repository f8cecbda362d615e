"""Choice of an op's implementation: one `resolve` function for every op of the package."""

from collections.abc import Callable

import torch

from .kernels.attn_res_ops import attn_res_read_limit, attn_res_read_triton
from .kernels.attn_res_pull_ops import PULL_TRITON
from .kernels.attn_res_two_phase_ops import (
    attn_res_phase1_triton,
    attn_res_phase2_triton,
    attn_res_two_phase_limit,
)
from .kernels.moda_depth_ops import depth_backward_triton, depth_forward_triton, moda_depth_limit
from .kernels.triton_runtime import triton_version

IMPLS = ("auto", "torch", "triton")

# op name -> Triton implementation, with the signature of the torch one it replaces.
TRITON_OPS: dict[str, Callable] = {}
# op name -> function of the op's inputs that tells why the Triton implementation cannot take them, or None.
TRITON_LIMITS: dict[str, Callable[..., str | None]] = {}

if triton_version() is not None:
    TRITON_OPS["attn_res_read"] = attn_res_read_triton
    TRITON_LIMITS["attn_res_read"] = attn_res_read_limit
    TRITON_OPS["attn_res_pull"] = PULL_TRITON
    TRITON_LIMITS["attn_res_pull"] = attn_res_read_limit
    TRITON_OPS["attn_res_phase1"] = attn_res_phase1_triton
    TRITON_OPS["attn_res_phase2"] = attn_res_phase2_triton
    TRITON_LIMITS["attn_res_phase1"] = TRITON_LIMITS["attn_res_phase2"] = attn_res_two_phase_limit
    TRITON_OPS["moda_depth_forward"] = depth_forward_triton
    TRITON_OPS["moda_depth_backward"] = depth_backward_triton
    TRITON_LIMITS["moda_depth_forward"] = TRITON_LIMITS["moda_depth_backward"] = moda_depth_limit


def resolve(op_name: str, impl: str, device: torch.device, torch_impl: Callable, inputs: tuple = ()) -> Callable:
    """Returns the function that runs `op_name` on `device`.

    `"auto"` takes the Triton implementation on a CUDA or HIP device when there is one that takes these inputs, and
    torch otherwise. An explicit choice is kept: `"triton"` raises rather than fall back.

    Args:
        op_name: key of the op in `TRITON_OPS`.
        impl: `"auto"`, `"torch"` or `"triton"`.
        device: device of the op's inputs. HIP devices also have the type `"cuda"`.
        torch_impl: the torch implementation of the op.
        inputs: arguments for the op's entry in `TRITON_LIMITS`; without them any inputs are taken for good.
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
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return torch_impl
    limit = TRITON_LIMITS[op_name](*inputs) if inputs and op_name in TRITON_LIMITS else None
    if limit is None:
        return triton_impl
    if impl == "triton":
        raise RuntimeError(f"impl='triton': {op_name!r} has no kernel for these inputs: {limit}")
    return torch_impl
