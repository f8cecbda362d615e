r"""Grouped AttnRes reads, phase 1: read the finished sources for all reads of a group in one pass.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. The reads of a group have the sources v_1 ... v_N in common that
are finished when the group opens. With w_s the query of read s times its key-norm weight:

    r_i = 1 / sqrt(mean(v_i^2) + eps),  x_si = r_i (w_s . v_i)
    lse_s = log sum_i exp(x_si),        o_s = sum_i exp(x_si - lse_s) v_i

Phase 2 (`attn_res_phase2_ops`) adds the newer sources to each read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attn_res_phase1(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float, impl: str = "auto"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Attend to the finished sources for all reads of a group (arXiv 2603.15031, Algorithm 1, phase 1).

    Args:
        sources: N >= 1 tensors [..., D] of the same shape, dtype and device.
        score_weights: the queries of S reads times their key-norm weights, [S, D].
        eps: epsilon of the key norm, added to the mean square of a source.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        S outputs o [..., D] in the dtype of the sources, S log-sum-exps [tokens] in float32 (float64 for float64), and
        the sources, for later uses: their gradients then pass through the backward of this op, which adds its own.

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    outs, lses = attn_res_phase1_reference(sources, score_weights, eps=eps)
    return tuple(outs), tuple(lses), tuple(sources)


def attn_res_phase1_reference(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute outputs and log-sum-exps of `attn_res_phase1` with autograd; arguments as there."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(dtype).flatten(0, -2) for source in sources]  # N x [tokens, D]
    weights = score_weights.to(dtype)
    norms = [torch.rsqrt(value.square().mean(-1) + eps) for value in values]  # N x [tokens]
    outs, lses = [], []
    for weight in weights.unbind(0):
        # Products and sums instead of a matrix product, which autocast would run in low precision.
        logits = torch.stack([(value * weight).sum(-1) * norm for value, norm in zip(values, norms, strict=True)])
        lse = logits.logsumexp(0)
        shares = (logits - lse).exp().unsqueeze(-1)  # [N, tokens, 1]
        mixed = sum(share * value for share, value in zip(shares.unbind(0), values, strict=True))
        outs.append(mixed.to(sources[0].dtype).view(sources[0].shape))
        lses.append(lse)
    return outs, lses
