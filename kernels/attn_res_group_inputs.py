"""The inputs of both phases of grouped AttnRes reads, forward and backward; see `attn_res_phase1` and `_phase2`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Phase1Inputs(NamedTuple):
    """Inputs of phase 1.

    Attributes:
        sources: N >= 1 finished sources, each [..., D].
        score_weights: the queries of S reads times their key-norm weights, [S, D].
        eps: epsilon of the key norm, added to the mean square of a source.
    """

    sources: Sequence[Tensor]
    score_weights: Tensor
    eps: float


class Phase1Result(NamedTuple):
    """Results of phase 1 and what its backward needs.

    Attributes:
        outs: o of S reads, each [..., D] in the dtype of the sources.
        lse: log-sum-exps, [S, tokens], in the dtype of sums.
        logits: x, [N, S, tokens], in any layout.
        rstd: r, [N, tokens].
    """

    outs: Sequence[Tensor]
    lse: Tensor
    logits: Tensor
    rstd: Tensor


class Phase1GradientInputs(NamedTuple):
    """Inputs of the backward of phase 1.

    Attributes:
        grad_outs: S gradients of the outputs, each [..., D], or None for a read that was not used.
        grad_lse: gradient of the log-sum-exps, [S, tokens], or None.
        passed: N gradients of the sources from later uses, each [..., D] or None, to be added to the results.
        sources: as in the forward.
        score_weights: as in the forward, in the dtype of sums.
        lse: as in the result of the forward.
        logits: as in the result of the forward.
        rstd: as in the result of the forward.
        needs_weights: whether the gradient of the score weights is needed.
    """

    grad_outs: Sequence[Tensor | None]
    grad_lse: Tensor | None
    passed: Sequence[Tensor | None]
    sources: Sequence[Tensor]
    score_weights: Tensor
    lse: Tensor
    logits: Tensor
    rstd: Tensor
    needs_weights: bool


class Phase2Inputs(NamedTuple):
    """Inputs of phase 2.

    Attributes:
        sources: R >= 1 sources that phase 1 has not read, each [..., D], oldest first.
        score_weight: the query of the read times its key-norm weight, [D].
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
        update: the output of the previous sublayer, [..., D], to be added to the last source first, or None.
        prior_out: o of phase 1 for this read, [..., D]; None for a read of `sources` alone.
        prior_lse: its log-sum-exp, [tokens], in the dtype of sums; None without `prior_out`.
    """

    sources: Sequence[Tensor]
    score_weight: Tensor
    eps: float
    read_scale: float = 1.0
    update: Tensor | None = None
    prior_out: Tensor | None = None
    prior_lse: Tensor | None = None


class Phase2Result(NamedTuple):
    """Results of phase 2 and what its backward needs.

    Attributes:
        h: the read, [..., D] in the dtype of the sources.
        newest: the last source with the update added, [..., D]; the last source itself without an update.
        stats: tensors of numbers per token, which only the same implementation's backward understands.
    """

    h: Tensor
    newest: Tensor
    stats: tuple[Tensor, ...]


class Phase2GradientInputs(NamedTuple):
    """Inputs of the backward of phase 2.

    Attributes:
        grad_h: gradient of h, [..., D].
        passed: R gradients of the sources from later uses, each [..., D] or None, to be added to the results.
        sources: as in the forward, with the update added to the last.
        score_weight: as in the forward, in the dtype of sums.
        read_scale: as in the forward.
        stats: as in the result of the forward.
        kept: h or `prior_out`, whichever the forward has kept; None for neither.
        keeps_read: whether `kept` is h.
        has_prior: whether there was a read of phase 1.
        needs_weight: whether the gradient of the score weight is needed.
    """

    grad_h: Tensor
    passed: Sequence[Tensor | None]
    sources: Sequence[Tensor]
    score_weight: Tensor
    read_scale: float
    stats: tuple[Tensor, ...]
    kept: Tensor | None
    keeps_read: bool
    has_prior: bool
    needs_weight: bool


def kept_for_backward(h: Tensor, prior_out: Tensor | None) -> tuple[Tensor | None, bool]:
    """Return what phase 2 keeps for its backward, h, o or neither, and whether it is h, which the next norm keeps too.

    With 16 bits, h has a rounding error that its differences from sources would show.
    """
    keeps_read = h.dtype in (torch.float32, torch.float64)
    return h if keeps_read else prior_out, keeps_read


class Phase2Gradients(NamedTuple):
    """Results of the backward of phase 2.

    Attributes:
        sources: R gradients, each [..., D]; that of the last one is also the gradient of the update.
        prior_out: gradient of `prior_out`, [..., D], or None without one.
        prior_lse: gradient of `prior_lse`, [tokens], or None without one.
        score_weight: gradient of the score weight, [D], or None if it is not needed.
    """

    sources: Sequence[Tensor]
    prior_out: Tensor | None
    prior_lse: Tensor | None
    score_weight: Tensor | None


class Phase1Impl(NamedTuple):
    """An implementation of phase 1 on plain tensors, without autograd.

    Attributes:
        forward: the forward.
        backward: the backward; returns N gradients of the sources, each [..., D], and that of the score weights.
        passes_sources: whether the sources are results of the op too, so that their gradients from later uses are
            added in its backward. Otherwise autograd adds them.
    """

    forward: Callable[[Phase1Inputs], Phase1Result]
    backward: Callable[[Phase1GradientInputs], tuple[Sequence[Tensor], Tensor | None]]
    passes_sources: bool = True


class Phase2Impl(NamedTuple):
    """An implementation of phase 2 on plain tensors, without autograd."""

    forward: Callable[[Phase2Inputs], Phase2Result]
    backward: Callable[[Phase2GradientInputs], Phase2Gradients]
