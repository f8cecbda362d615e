"""The inputs of the ops of phase 2 of Block AttnRes, forward and backward, in the order of their schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Phase2Inputs(NamedTuple):
    """Inputs of phase 2, as in `experimental.attn_res_two_phase_ops`.

    Attributes:
        partial: the open block, [..., D].
        update: the output of the previous sublayer, [..., D], or None.
        seq_out: output of phase 1 for this read, [..., D].
        seq_lse: log-sum-exp of phase 1 for this read, [...].
        score_weight: the query times the key-norm weight, [D], in the dtype of sums.
        eps: epsilon of the key norm.
        read_scale: factor on the weighted mean.
        norm_weight: weight of the norm of the result, [D], or None.
        norm_eps: epsilon of that norm.
    """

    partial: Tensor
    update: Tensor | None
    seq_out: Tensor
    seq_lse: Tensor
    score_weight: Tensor
    eps: float
    read_scale: float
    norm_weight: Tensor | None
    norm_eps: float


class Phase2GradientInputs(NamedTuple):
    """Inputs of the backward of phase 2.

    Attributes:
        grad_out: gradient of the output, [..., D].
        grad_total: gradient of v from other uses, [..., D], or None.
        total: v, the open block with the update, [..., D].
        seq_out: as in the forward.
        seq_lse: as in the forward.
        score_weight: as in the forward.
        norm_weight: as in the forward.
        stats: the statistics of the forward, [tokens, 3].
        read_scale: as in the forward.
    """

    grad_out: Tensor
    grad_total: Tensor | None
    total: Tensor
    seq_out: Tensor
    seq_lse: Tensor
    score_weight: Tensor
    norm_weight: Tensor | None
    stats: Tensor
    read_scale: float
