"""Error bounds of the ops relative to float64, shared by all op tests."""

import torch
from torch import Tensor

# Relative RMSE of outputs and of every gradient.
RELATIVE_RMSE = {
    # One rounding of the result at 2^-9, about 1.7e-3 on random values; the design allows 5e-3.
    torch.bfloat16: 4e-3,
    # One rounding of the result at 2^-12, about 2e-4 on random values.
    torch.float16: 5e-4,
    # Sums of some thousand float32 terms and a cancellation in ds: up to 9e-7 at one token; the design allows 1e-6.
    torch.float32: 1e-6,
    # The same sums at 1.1e-16, with the same factor for cancellation in a gradient.
    torch.float64: 1e-14,
}


def relative_rmse(actual: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the error divided by that of `expected` (by 1 if it is zero)."""
    expected = expected.double()
    error = (actual.double() - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt()
    return (error / scale if scale > 0 else error).item()
