"""The inputs of the AttnRes read, forward and backward; those of its ops are in the order of their schemas."""

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


class Prior(NamedTuple):
    """A read of phase 1 that is one more source of a read, see `attn_res_phase2_ops`.

    Attributes:
        out: o of phase 1, [..., D].
        lse: its log-sum-exp, [tokens], in the dtype of sums.
    """

    out: Tensor
    lse: Tensor


class PriorGradients(NamedTuple):
    """What the backward of a read with a prior needs, and its results for the prior.

    Attributes:
        kept: h or o, [..., D].
        keeps_read: whether `kept` is h.
        lse: as in `Prior`.
        grad_out: output, the gradient of o, [..., D].
        grad_lse: output, the gradient of lse, [tokens].
    """

    kept: Tensor
    keeps_read: bool
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


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
