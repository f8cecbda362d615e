r"""Block Attention Residuals in two phases: read the finished sources for a whole block, then add the open block.

Paper: arXiv 2603.15031, section 3.2 and Algorithm 1. All reads after the first write of a block have the same finished
sources v_1 ... v_N, and only the open block differs. With w_s the query of read s times its key-norm weight and
r(v) = 1 / sqrt(mean(v^2) + eps):

    phase 1   x_si = r(v_i) (w_s . v_i),   lse_s = log sum_i exp(x_si),   o_s = sum_i exp(x_si - lse_s) v_i
    phase 2   v = round(partial + update),   gate = sigmoid(r(v) (w_s . v) - lse_s)
              h = read_scale ((1 - gate) o_s + gate v)

h equals `attn_res_read` of `[*sources, v]`: the two parts of a softmax are merged by their log-sum-exps. A source is
loaded twice per block instead of once per read. The torch implementations use autograd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.attn_res_two_phase_ops import (
    attn_res_phase1_triton,
    attn_res_phase2_triton,
    attn_res_two_phase_limit,
)
from ..op_dispatch import Op, register, resolve


def attn_res_phase1(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float, impl: str = "auto"
) -> tuple[list[Tensor], list[Tensor]]:
    """Attend to the finished sources for all reads of a block (arXiv 2603.15031, Algorithm 1, phase 1).

    Args:
        sources: N >= 1 tensors [..., D] of the same shape, dtype and device.
        score_weights: the queries of S reads times their key-norm weights, [S, D].
        eps: epsilon of the key norm, added to the mean square of a source.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        S outputs o [..., D] in the dtype of the sources, and S log-sum-exps [...] in float32 (float64 for float64).

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    if not sources or score_weights.dim() != 2 or score_weights.shape[1] != sources[0].shape[-1]:
        raise ValueError(
            "`score_weights` must have the shape [reads, D] with the D of at least one source, got "
            f"{tuple(score_weights.shape)} and {len(sources)} sources"
        )
    _check_like("sources", sources[0], sources)
    phase1 = resolve(ATTN_RES_PHASE1, impl, sources[0].device, (sources[0],))
    return phase1(sources, score_weights, eps=eps)


def attn_res_phase1_reference(
    sources: Sequence[Tensor], score_weights: Tensor, *, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute `attn_res_phase1` in torch, with its arguments except `impl`, and its results."""
    dtype = torch.promote_types(sources[0].dtype, torch.float32)
    values = [source.to(dtype) for source in sources]
    weights = score_weights.to(dtype)
    norms = [torch.rsqrt(value.square().mean(-1) + eps) for value in values]  # N x [...]
    outs, lses = [], []
    for weight in weights.unbind(0):
        # Products and sums instead of a matrix product, which autocast would run in low precision.
        logits = torch.stack([(value * weight).sum(-1) * norm for value, norm in zip(values, norms, strict=True)])
        lse = logits.logsumexp(0)
        shares = (logits - lse).exp().unsqueeze(-1)  # [N, ..., 1]
        mixed = sum(share * value for share, value in zip(shares.unbind(0), values, strict=True))
        outs.append(mixed.to(sources[0].dtype))
        lses.append(lse)
    return outs, lses


def attn_res_phase2(
    partial: Tensor,
    update: Tensor | None,
    seq_out: Tensor,
    seq_lse: Tensor,
    score_weight: Tensor,
    *,
    eps: float,
    read_scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the open block to one read of phase 1 (arXiv 2603.15031, Algorithm 1, phase 2).

    Args:
        partial: the open block, [..., D].
        update: the output of the previous sublayer, [..., D], which is first added to the open block, or `None`.
        seq_out: output o of phase 1, [..., D].
        seq_lse: its log-sum-exp, [...].
        score_weight: the query of the read times its key-norm weight, [D].
        eps: epsilon of the key norm, added to the mean square of a source.
        read_scale: factor on the weighted mean.
        norm_weight: weight [D] of an RMSNorm of the result, `h / sqrt(mean(h^2) + norm_eps) * norm_weight`, or `None`.
        norm_eps: epsilon of that norm.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        h [..., D], normalised if `norm_weight` is given, and the updated open block [..., D].

    Raises:
        ValueError: if the inputs have other shapes or dtypes.
    """
    _check_like("update and seq_out", partial, [x for x in (update, seq_out) if x is not None])
    if seq_lse.shape != partial.shape[:-1] or score_weight.shape != partial.shape[-1:]:
        raise ValueError(
            f"`seq_lse` and `score_weight` must have the shapes {tuple(partial.shape[:-1])} and "
            f"{tuple(partial.shape[-1:])}, got {tuple(seq_lse.shape)} and {tuple(score_weight.shape)}"
        )
    phase2 = resolve(ATTN_RES_PHASE2, impl, partial.device, (partial,))
    return phase2(
        partial,
        update,
        seq_out,
        seq_lse,
        score_weight,
        eps=eps,
        read_scale=read_scale,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )


def attn_res_phase2_reference(
    partial: Tensor,
    update: Tensor | None,
    seq_out: Tensor,
    seq_lse: Tensor,
    score_weight: Tensor,
    *,
    eps: float,
    read_scale: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute `attn_res_phase2` in torch, with its arguments except `impl`, and its results."""
    dtype = torch.promote_types(partial.dtype, torch.float32)
    total = partial if update is None else partial + update
    value = total.to(dtype)
    logit = (value * score_weight.to(dtype)).sum(-1) * torch.rsqrt(value.square().mean(-1) + eps)
    # Two sigmoids, since 1 - gate would lose all precision for a gate near 1.
    gate, rest = torch.sigmoid(logit - seq_lse).unsqueeze(-1), torch.sigmoid(seq_lse - logit).unsqueeze(-1)  # [..., 1]
    h = read_scale * (rest * seq_out.to(dtype) + gate * value)
    if norm_weight is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    return h.to(partial.dtype), total


def _check_like(name: str, first: Tensor, others: Sequence[Tensor]) -> None:
    """Check that tensors have the shape, dtype and device of the first, which kernels assume."""
    for other in others:
        if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"`{name}` must have the shape {tuple(first.shape)}, the dtype {first.dtype} and the device "
                f"{first.device}, got {tuple(other.shape)}, {other.dtype} and {other.device}"
            )


ATTN_RES_PHASE1 = register(
    Op("attn_res_two_phase_1", attn_res_phase1_reference, attn_res_phase1_triton, attn_res_two_phase_limit)
)
ATTN_RES_PHASE2 = register(
    Op("attn_res_two_phase_2", attn_res_phase2_reference, attn_res_phase2_triton, attn_res_two_phase_limit)
)
