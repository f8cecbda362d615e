"""The inputs of the ops of the AttnRes read, forward and backward, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ReadInputs(NamedTuple):
    """Inputs of a read with a fused add before and a fused norm after it.

    Attributes:
        sources: N >= 1 tensors [..., D].
        score_weight: the query times the key-norm weight, [D], in the dtype of sums.
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
        update: tensor [..., D] that is first added to the newest source, or None.
        norm_weight: weight of an RMSNorm of the result, [D], or None.
        norm_eps: epsilon of that norm.
    """

    sources: list[Tensor]
    score_weight: Tensor
    eps: float
    read_scale: float
    update: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float


class ReadGradientInputs(NamedTuple):
    """Inputs of the backward of a read.

    Attributes:
        grad_out: gradient of the output, [..., D].
        grad_partial: gradient of `v_last` from other uses, [..., D], or None.
        sources: as in the forward, with `v_last` instead of the newest source.
        score_weight: as in the forward.
        stats: the statistics of the forward.
        read_scale: as in the forward.
        norm_weight: as in the forward.
        needs_grad: for every source, whether it needs a gradient.
    """

    grad_out: Tensor
    grad_partial: Tensor | None
    sources: list[Tensor]
    score_weight: Tensor
    stats: Tensor
    read_scale: float
    norm_weight: Tensor | None
    needs_grad: list[bool]
