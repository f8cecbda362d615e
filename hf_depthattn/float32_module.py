"""Modules whose parameters stay float32 in a half-precision model."""

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose parameters stay float32 under casts to half precision (`.to(torch.bfloat16)`, `.half()`).

    Queries are small, and the updates of a query in bfloat16 would be lost to rounding. Casting to float64 is
    allowed.
    """

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_float32, recurse)
