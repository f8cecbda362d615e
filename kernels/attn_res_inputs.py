"""What the ops of the AttnRes read are given, forward and backward, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ReadInputs(NamedTuple):
    """A read with the add before it and the norm after it.

    Attributes:
        sources: N >= 1 tensors [..., D].
        score_weight: [D], of the dtype of the sums.
        eps: added to the mean square of a source.
        read_scale: factor on the mix.
        update: [..., D], added to the newest source first, or None.
        norm_weight: [D], or None.
        norm_eps: added to the mean square of the read.
    """

    sources: list[Tensor]
    score_weight: Tensor
    eps: float
    read_scale: float
    update: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float


class ReadGradientInputs(NamedTuple):
    """The backward of a read.

    Attributes:
        grad_out: [..., D].
        grad_partial: [..., D], of `v_last`, or None.
        sources: as in the forward, with `v_last` for the newest one.
        score_weight: as in the forward.
        stats: of the forward.
        read_scale: as in the forward.
        norm_weight: as in the forward.
        needs_grad: which sources do.
    """

    grad_out: Tensor
    grad_partial: Tensor | None
    sources: list[Tensor]
    score_weight: Tensor
    stats: Tensor
    read_scale: float
    norm_weight: Tensor | None
    needs_grad: list[bool]
