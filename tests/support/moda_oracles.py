"""Two slow, independent implementations of MoDA: a loop from the equation, and SDPA over joined keys."""

import torch
from torch import Tensor


def loop_moda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    seen: Tensor,
    scale: float,
    gate: Tensor | None = None,
    depth_query: Tensor | None = None,
) -> Tensor:
    """Compute one query at a time (arXiv 2603.15619, section 3); returns [B, T, Hq, dv].

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, S, d].
        value: [B, Hk, S, dv].
        depth_keys: L tensors [B, Hk, T, d].
        depth_values: L tensors [B, Hk, T, dv].
        seen: bool [B, T, S].
        scale: factor on q . k.
        gate: [Hq] or `None`.
        depth_query: [B, Hq, T, d], query for the slots, if it differs.
    """
    batch, num_heads, num_tokens, _ = query.shape
    group = num_heads // key.shape[1]
    depth_query = query if depth_query is None else depth_query
    rows = []
    for b in range(batch):
        for t in range(num_tokens):
            for h in range(num_heads):
                kv = h // group
                pairs = [
                    (query[b, h, t] @ key[b, kv, j], value[b, kv, j]) for j in range(key.shape[2]) if seen[b, t, j]
                ]
                slots = [
                    (depth_query[b, h, t] @ k[b, kv, t], v[b, kv, t])
                    for k, v in zip(depth_keys, depth_values, strict=True)
                ]
                nothing = torch.zeros_like(value[b, kv, 0])
                joint = _softmax_mix(pairs + slots, scale) if pairs or slots else nothing
                if gate is not None:
                    alone = _softmax_mix(pairs, scale) if pairs else nothing
                    joint = alone + gate[h] * (joint - alone)
                rows.append(joint)
    return torch.stack(rows).view(batch, num_tokens, num_heads, -1)


def _softmax_mix(pairs: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    weights = [torch.exp(scale * logit) for logit, _ in pairs]
    total = sum(weights)
    return sum((weight / total) * value for weight, (_, value) in zip(weights, pairs, strict=True))


def joined_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    seen: Tensor,
    scale: float,
) -> Tensor:
    """Run torch's SDPA over the keys of the sequence and of all tokens' slots; arguments as in `loop_moda`."""
    batch, num_heads, num_tokens, _ = query.shape
    group = num_heads // key.shape[1]
    keys = torch.cat([key, *depth_keys], 2).repeat_interleave(group, 1)  # [B, Hq, S + L T, d]
    values = torch.cat([value, *depth_values], 2).repeat_interleave(group, 1)
    own_token = torch.eye(num_tokens, dtype=torch.bool).expand(batch, -1, -1)
    mask = torch.cat([seen, *(own_token for _ in depth_keys)], 2)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def masks_of_all_kinds(batch: int, length: int) -> dict[str, Tensor]:
    """Return masks [B, T, T] by name: causal, left-padded, packed, sliding window."""
    causal = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1)
    padded = causal.clone()
    padded[0, :, :3] = False  # the first three tokens of one sequence are padding; their rows see nothing
    document = torch.arange(length) // (length // 2 + 1)
    packed = causal & (document[:, None] == document[None, :])
    window = causal & ~torch.ones(length, length, dtype=torch.bool).tril(-3)
    return {"causal": causal, "padded": padded, "packed": packed, "sliding": window}
