"""The cross-entropy of every prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy [B, T - 1] of logits [B, T, V] and ids [B, T] in at least float32."""
    targets = ids[:, 1:].to(logits.device)
    # One sequence at a time: a float32 copy of all logits may be larger than the model.
    wide = torch.promote_types(logits.dtype, torch.float32)
    pairs = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(row[:-1].to(wide), target, reduction="none") for row, target in pairs])
