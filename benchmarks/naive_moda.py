"""Naive Mixture-of-Depths Attention, the baseline of the benchmarks."""

import torch
from torch import Tensor

from hf_depthattn.moda_attention_ops import ModaInputs


def naive_moda_attention(inputs: ModaInputs, **_) -> tuple[Tensor, None]:
    """Compute `moda_attention` by concatenation: S + L scores per token, one softmax, two weighted sums.

    The slots of a token are gathered into one tensor, as in a depth cache (arXiv 2603.15619, Fig. 3).
    """
    query, key, value, depth_keys, depth_values, scale = inputs[:6]
    mask = inputs.mask
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    q = query.unflatten(1, (num_kv_heads, -1))  # [B, Hk, G, T, d]
    slot_keys, slot_values = torch.stack(list(depth_keys), 3), torch.stack(list(depth_values), 3)  # [B, Hk, T, L, d]
    seq_logits = scale * torch.einsum("bhgtd,bhsd->bhgts", q, key)
    if inputs.causal:
        mask = torch.ones(seq_logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        seq_logits = seq_logits.masked_fill(~mask, -torch.inf)
    depth_logits = scale * torch.einsum("bhgtd,bhtld->bhgtl", q, slot_keys)
    weights = torch.cat((seq_logits, depth_logits), -1).softmax(-1)  # [B, Hk, G, T, S + L]
    seq_weights, depth_weights = weights.split((num_keys, len(depth_keys)), -1)
    out = torch.einsum("bhgts,bhsd->bhgtd", seq_weights, value)
    out = out + torch.einsum("bhgtl,bhtld->bhgtd", depth_weights, slot_values)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None
