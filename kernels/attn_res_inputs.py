"""The inputs of the ops of the AttnRes read, forward and backward, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ReadInputs(NamedTuple):
    """Inputs of a read.

    Attributes:
        sources: N >= 1 tensors [..., D].
        score_weight: the query times the key-norm weight, [D], in the dtype of sums.
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
    """

    sources: list[Tensor]
    score_weight: Tensor
    eps: float
    read_scale: float


class ReadGradientInputs(NamedTuple):
    """Inputs of the backward of a read.

    Attributes:
        grad_out: gradient of the output, [..., D].
        sources: as in the forward.
        score_weight: as in the forward.
        stats: the statistics of the forward.
        read_scale: as in the forward.
        needs_grad: for every source, whether it needs a gradient.
    """

    grad_out: Tensor
    sources: list[Tensor]
    score_weight: Tensor
    stats: Tensor
    read_scale: float
    needs_grad: list[bool]
