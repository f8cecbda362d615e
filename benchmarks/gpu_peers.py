"""Kernels of other packages, imported on first use; `Absent` is raised if the import fails.

Signatures: FLA `fla.ops.attnres.fused_attnres` and `fla.ops.attn.parallel_attn` (0.6), fast-attnres `attnres.attnres`
    (2.1), flash-attn-res 0.1 (`experimental.autograd`, `ops.phase_1`), Liger
    `liger_kernel.transformers.functional.liger_attn_res` (0.8), FlashAttention 3
    `flash_attn_interface.flash_attn_func`. They take queries and weights in the dtype of the sources.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from gpu_cases import Absent, Row, optional
from torch import Tensor, nn

EPS = 1e-6
_FLA_GLUON = "FLA_ATTNRES_GLUON"


def fla_read(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Compute FLA's read with its fused output norm."""
    fused_attnres = optional("fla.ops.attnres", "fused_attnres")
    dtype = sources[0].dtype
    key_weight = torch.ones_like(query, dtype=dtype)
    norm_weight = None if norm_weight is None else norm_weight.to(dtype)
    return fused_attnres(query.to(dtype), tuple(sources), key_weight, norm_weight, rms_eps=EPS)


def fla_gluon_read(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor | None) -> Tensor:
    """Compute FLA's read with its Gluon backend, which FLA selects in every call by this variable (0.6)."""
    before = os.environ.get(_FLA_GLUON)
    os.environ[_FLA_GLUON] = "1"
    try:
        optional("fla.ops.attnres.backends.gluon", "__name__")
        return fla_read(sources, query, norm_weight)
    finally:
        if before is None:
            del os.environ[_FLA_GLUON]
        else:
            os.environ[_FLA_GLUON] = before


def fast_attnres_read(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    """Compute the read of fast-attnres, which supports bfloat16 on CUDA devices."""
    attnres = optional("attnres", "attnres")
    return attnres(list(sources), query.to(sources[0].dtype), eps=EPS)


def liger_read(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    """Compute Liger's read, which takes the sources as one tensor."""
    liger_attn_res = optional("liger_kernel.transformers.functional", "liger_attn_res")
    dtype = sources[0].dtype
    return liger_attn_res(torch.stack(list(sources)), query.to(dtype), torch.ones_like(query, dtype=dtype), EPS)


def flash_attn_res_read(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    """Compute phase 1 of flash-attn-res with one query, which takes the sources as one tensor."""
    phase_1 = optional("flash_attn_res.ops.phase_1", "phase_1_batched_attention_triton_op")
    out, _ = phase_1(torch.stack(list(sources)), query.to(sources[0].dtype)[None], EPS)
    return out[0].to(sources[0].dtype)


class _NormedSublayer(nn.Module):
    """A sublayer with its pre-norm, since flash-attn-res looks for the norm's weight among its parameters."""

    norm_weight: Tensor

    def __init__(self, sublayer: nn.Module, norm_weight: Tensor):
        super().__init__()
        self.sublayer = sublayer
        # Set the leaf itself, since a new Parameter would receive the gradient instead.
        self._parameters["norm_weight"] = norm_weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.sublayer(nn.functional.rms_norm(x, x.shape[-1:], self.norm_weight, EPS))


def flash_attn_res_stack(problem) -> list[Tensor]:
    """Solve a Block stack in two phases, with all sublayers inside one autograd function."""
    if problem.block_size == 1:
        raise Absent("flash-attn-res is only run for Block AttnRes; Full needs a kernel per number of sources")
    attention = optional("flash_attn_res.experimental.autograd", "BlockAttentionResiduals")
    layers = [_NormedSublayer(*pair) for pair in zip(problem.sublayers, problem.norm_weights, strict=True)]
    queries = torch.stack(problem.queries).to(problem.embeddings.dtype)
    # In the order of `layer.parameters()`.
    return [attention.apply(problem.embeddings, queries, layers, problem.block_size, EPS, *problem.norm_weights)]


STACK_PEERS = (Row("flash-attn-res", "peer", flash_attn_res_stack),)


def fla_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute FLA's causal attention in Triton, [B, H, T, d] -> [B, T, Hq, d]."""
    parallel_attn = optional("fla.ops.attn", "parallel_attn")
    return parallel_attn(*(x.transpose(1, 2) for x in (query, key, value)), scale=scale)


def flash_attention_3(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute FlashAttention 3 from its own package, [B, H, T, d] -> [B, T, Hq, d]."""
    attention = optional("flash_attn_interface", "flash_attn_func")
    out = attention(*(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scale, causal=True)
    # Older versions also return the log-sum-exp.
    return out[0] if isinstance(out, tuple) else out
