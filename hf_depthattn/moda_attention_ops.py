r"""Mixture-of-Depths Attention (MoDA): one softmax over the sequence and the depth slots of the own token.

Paper: arXiv 2603.15619, section 3. Notation as in `moda_depth_ops`. With a gate a per query head, for retrofitting:

    out = o_seq + a (o_joint - o_seq)      a = 0 is the host, a = 1 (or no gate) is the paper

`moda_attention` runs the sequence part on one of torch's fused kernels and joins the slots to it. In backward, the
kernel's own backward is called with the joint output and log-sum-exp. With a gate, w = exp(lse_seq - lse_joint) the
weight of the sequence and c = (1 - a) + a w, the same algebra gives

    ds_j = p_seq_j (c g . v_j - c g . o')      o' = o_seq + (a w / c) (o_joint - o_seq)

that is, the kernel's backward with upstream gradient c g, output o' and the sequence's own log-sum-exp; and
da = sum g . (o_joint - o_seq). The gradients of the slots are those of the joint softmax for a g.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .moda_depth_ops import depth_backward, depth_forward
from .op_dispatch import resolve
from .sequence_attention import causal_mask, find_kernel, sequence_backward, sequence_forward

# c is kept this far from 0, where slots that hold nearly all weight or a gate beyond 1 bring it: o' holds 1 / c, in
# the dtype of the kernel. Rows below the floor have gradients of that order.
_SMALLEST_FACTOR = {
    torch.float16: 2.0**-12,
    torch.bfloat16: 2.0**-40,
    torch.float32: 2.0**-40,
    torch.float64: 2.0**-80,
}


def moda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    *,
    scale: float,
    depth_query: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    gate: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the sequence and the depth slots in one softmax (arXiv 2603.15619, section 3).

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, S, d].
        value: [B, Hk, S, dv].
        depth_keys: L tensors [B, Hk, T, d].
        depth_values: L tensors [B, Hk, T, dv].
        scale: factor on q . k, of the sequence and the slots alike.
        depth_query: [B, Hq, T, d], the query that meets the slots, if it is not `query`.
        mask: [B or 1, Hq or 1, T, S], bool (True is seen) or additive; of the sequence only.
        causal: the last query sees the last key, the one before it all but that, ...; not together with a mask.
        window: tokens that a sliding window sees, the own one included; on a GPU, with `causal`.
        gate: [Hq], or `None` for the paper.
        impl: `"auto"`, `"torch"` or `"triton"`, for the depth part.

    Returns:
        `out` [B, T, Hq, dv] and the joint log-sum-exp [B, Hq, T], detached.

    Raises:
        ValueError: inputs that do not fit together, or that no fused kernel runs (`moda_attention_reference` does).
    """
    _check(query, key, value, depth_keys, depth_values, gate)
    kernel = find_kernel(query, mask, window)
    if causal and key.shape[2] != query.shape[2] and kernel is not None and not kernel.aligns_last_query:
        mask, causal = causal_mask(query.shape[2], key.shape[2], query.device), False
    if kernel is None:
        raise ValueError(
            f"no fused kernel for {query.dtype} on {query.device.type!r} with mask={mask is not None} and "
            f"window={window}; use `moda_attention_reference` (attn_implementation='eager')."
        )
    out, lse, *_ = torch.ops.depthattn.moda_attention(
        query, key, value, depth_query, list(depth_keys), list(depth_values), mask, gate, causal, scale, window, impl
    )
    return out, lse


def moda_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    *,
    scale: float,
    depth_query: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    gate: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`moda_attention` written as the paper's equation: all logits side by side, one softmax, autograd.

    It runs where attention weights are asked for (`attn_implementation="eager"`), with logit soft-capping, attention
    sinks and dropout on weights, and follows the rounding of transformers' eager attention: the softmax is float32
    (float64 for float64), products are in the dtype of the inputs.

    Args:
        query, key, value, depth_keys, depth_values, scale, depth_query, mask, causal, gate: as in `moda_attention`.
        sinks: [Hq], a logit per head that takes part in the softmax and has no value.
        softcap: `softcap * tanh(s / softcap)` in place of every logit s, before the mask.
        dropout: of the weights.

    Returns:
        `out` [B, T, Hq, dv], the weights of the sequence [B, Hq, T, S] and of the slots [B, Hq, T, L], as they enter
        `out`: after dropout and gate.
    """
    _check(query, key, value, depth_keys, depth_values, gate)
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, 1) for x in (key, value))  # [B, Hq, S, d]
    seq_logits = _capped(torch.matmul(query, key.transpose(2, 3)) * scale, softcap)  # [B, Hq, T, S]
    if causal:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        seq_logits = seq_logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else seq_logits + mask
    # [B, Hq, T, L]; each slot is repeated for the heads of its group.
    depth_query = query if depth_query is None else depth_query
    slot_logits = [(depth_query * k.repeat_interleave(num_groups, 1)).sum(-1) for k in depth_keys]
    depth_logits = _capped(torch.stack(slot_logits, -1) * scale, softcap) if slot_logits else seq_logits[..., :0]
    columns = [seq_logits, depth_logits]
    if sinks is not None:
        columns.append(sinks.reshape(1, -1, 1, 1).expand(*seq_logits.shape[:3], 1).to(seq_logits.dtype))
    num_keys, num_slots = seq_logits.shape[-1], depth_logits.shape[-1]
    seq_weights, depth_weights = _softmax(columns, dropout).split_with_sizes(
        [num_keys, num_slots, len(columns) - 2], -1
    )[:2]
    if gate is not None:
        seq_only = _softmax([seq_logits, *columns[2:]], dropout)[..., :num_keys]
        gate = gate.to(seq_weights.dtype).reshape(1, -1, 1, 1)
        seq_weights = seq_only + gate * (seq_weights - seq_only)
        depth_weights = gate * depth_weights
    out = torch.matmul(seq_weights, value)  # [B, Hq, T, dv]
    for slot, slot_value in enumerate(depth_values):
        out = out + depth_weights[..., slot, None] * slot_value.repeat_interleave(num_groups, 1)
    return out.transpose(1, 2).contiguous(), seq_weights, depth_weights


def gated(seq_out: Tensor, joint: Tensor, gate: Tensor) -> Tensor:
    """`seq_out + gate (joint - seq_out)` for [B, T, Hq, dv] and a gate [Hq], which is not rounded to 16 bits."""
    wide = torch.float64 if joint.dtype == torch.float64 else torch.float32
    return torch.lerp(seq_out.to(wide), joint.to(wide), gate.to(wide)[:, None]).to(joint.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if not softcap else torch.tanh(logits / softcap) * softcap


def _softmax(columns: list[Tensor], dropout: float) -> Tensor:
    logits = torch.cat(columns, -1)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A token that sees nothing at all has no weights, not NaN.
    weights = torch.softmax(logits, -1, dtype=wide).nan_to_num(0.0).to(logits.dtype)
    return torch.nn.functional.dropout(weights, dropout) if dropout else weights


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    gate: Tensor | None,
) -> None:
    batch, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"`key` must have a number of heads that divides the {num_heads} of `query`, got {num_kv_heads}"
        )
    if len(depth_keys) != len(depth_values):
        raise ValueError(f"got {len(depth_keys)} `depth_keys` but {len(depth_values)} `depth_values`")
    for name, slots, dim in (("depth_keys", depth_keys, head_dim), ("depth_values", depth_values, value.shape[-1])):
        for slot in slots:
            if slot.shape != (batch, num_kv_heads, num_tokens, dim):
                raise ValueError(
                    f"`{name}` must have the shape {(batch, num_kv_heads, num_tokens, dim)} (batch, key-value heads, "
                    f"tokens of this call, head dimension), got {tuple(slot.shape)}"
                )
    if gate is not None and gate.shape != (num_heads,):
        raise ValueError(f"`gate` must have the shape {(num_heads,)}, one per query head, got {tuple(gate.shape)}")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_query: Tensor | None,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    mask: Tensor | None,
    gate: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns out, lse_joint and, with a gate, o_joint, o_seq and lse_seq (empty otherwise: out is o_joint)."""
    seq_out, seq_lse = sequence_forward(query, key, value, mask, causal, scale, window)
    depth = (query if depth_query is None else depth_query, depth_keys, depth_values)
    merge = resolve("moda_depth_forward", impl, query.device, depth_forward, depth)
    joint, lse = merge(*depth, seq_out, seq_lse, scale, 0.0)
    if gate is None:
        return joint, lse, *(joint.new_empty(0) for _ in range(3))
    seq_out = seq_out.transpose(1, 2).contiguous()
    out = gated(seq_out, joint, gate)
    return out, lse, joint, seq_out, seq_lse.contiguous()


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    depth_query: Tensor | None,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    mask: Tensor | None,
    gate: Tensor | None,
    joint: Tensor,
    lse: Tensor,
    seq_out: Tensor,
    seq_lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """Gradients of query, key, value, depth query (empty without one), slots and gate (empty without one)."""
    seq_grad, slot_grad, believed_out, believed_lse = grad_out, grad_out, joint, lse
    grad_gate = grad_out.new_empty(0)
    if gate is not None:
        difference = joint - seq_out
        wide_grad = grad_out.to(lse.dtype)
        grad_gate = (wide_grad * difference).sum((0, 1, 3)).to(gate.dtype)
        head_gate = gate.to(lse.dtype)[:, None]  # [Hq, 1]
        seq_weight = (seq_lse - lse).exp_().transpose(1, 2).unsqueeze(-1)  # [B, T, Hq, 1]
        factor = (1 - head_gate) + head_gate * seq_weight
        smallest = _SMALLEST_FACTOR[grad_out.dtype]
        factor = torch.where(factor.abs() < smallest, smallest, factor)
        believed_out = (seq_out + (head_gate * seq_weight / factor) * difference).to(joint.dtype)
        # The kernel's own value for a token that sees nothing; its weights are 0 with any finite one.
        believed_lse = seq_lse.masked_fill(seq_lse.isneginf(), 0.0)
        seq_grad = (factor * wide_grad).to(grad_out.dtype)
        slot_grad = (head_gate * wide_grad).to(grad_out.dtype)
    grad_query, grad_key, grad_value = sequence_backward(
        seq_grad.transpose(1, 2),
        query,
        key,
        value,
        mask,
        believed_out.transpose(1, 2),
        believed_lse,
        causal,
        scale,
        window,
    )
    depth = (query if depth_query is None else depth_query, depth_keys, depth_values)
    backward = resolve("moda_depth_backward", impl, query.device, depth_backward, depth)
    depth_grad_query, grad_depth_keys, grad_depth_values = backward(slot_grad, *depth, joint, lse, scale, 0.0)
    if depth_query is None:
        grad_query, depth_grad_query = grad_query + depth_grad_query, grad_out.new_empty(0)
    sequence_gradients = (gradient.contiguous() for gradient in (grad_query, grad_key, grad_value))
    return *sequence_gradients, depth_grad_query, grad_depth_keys, grad_depth_values, grad_gate


def _forward_fake(
    query, key, value, depth_query, depth_keys, depth_values, mask, gate, causal, scale, window, impl
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_tokens, _ = query.shape
    out = query.new_empty(batch, num_tokens, num_heads, value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(batch, num_heads, num_tokens, dtype=wide)
    if gate is None:
        return out, lse, *(query.new_empty(0) for _ in range(3))
    return out, lse, torch.empty_like(out), torch.empty_like(out), torch.empty_like(lse)


def _backward_fake(
    grad_out,
    query,
    key,
    value,
    depth_query,
    depth_keys,
    depth_values,
    mask,
    gate,
    joint,
    lse,
    seq_out,
    seq_lse,
    causal,
    scale,
    window,
    impl,
):
    return (
        *(x.new_empty(x.shape) for x in (query, key, value)),
        grad_out.new_empty(0) if depth_query is None else torch.empty_like(depth_query),
        [torch.empty_like(slot) for slot in depth_keys],
        [torch.empty_like(slot) for slot in depth_values],
        grad_out.new_empty(0) if gate is None else torch.empty_like(gate),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    query, key, value, depth_query, depth_keys, depth_values, mask, gate, *ctx.options = inputs
    out, lse, joint, seq_out, seq_lse = output
    ctx.mark_non_differentiable(lse, joint, seq_out, seq_lse)
    ctx.num_slots = len(depth_keys)
    # Without a gate the output is the joint softmax itself.
    joint = out if gate is None else joint
    ctx.save_for_backward(
        query, key, value, depth_query, mask, gate, joint, lse, seq_out, seq_lse, *depth_keys, *depth_values
    )


def _differentiate(ctx, grad_out: Tensor, *_):
    query, key, value, depth_query, mask, gate, joint, lse, seq_out, seq_lse, *slots = ctx.saved_tensors
    depth_keys, depth_values = slots[: ctx.num_slots], slots[ctx.num_slots :]
    *grad_sequence, grad_depth_query, grad_keys, grad_values, grad_gate = torch.ops.depthattn.moda_attention_backward(
        grad_out.contiguous(),
        query,
        key,
        value,
        depth_query,
        depth_keys,
        depth_values,
        mask,
        gate,
        joint,
        lse,
        seq_out,
        seq_lse,
        *ctx.options,
    )
    return (
        *grad_sequence,
        None if depth_query is None else grad_depth_query,
        grad_keys,
        grad_values,
        None,
        None if gate is None else grad_gate,
        *(None for _ in ctx.options),
    )


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::moda_attention_backward",
        _backward,
        mutates_args=(),
        schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? depth_query, Tensor[] depth_keys, "
        "Tensor[] depth_values, Tensor? mask, Tensor? gate, Tensor joint, Tensor lse, Tensor seq_out, Tensor seq_lse, "
        "bool causal, float scale, SymInt? window, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    )
    backward.register_fake(_backward_fake)
    forward = torch.library.custom_op(
        "depthattn::moda_attention",
        _forward,
        mutates_args=(),
        schema="(Tensor query, Tensor key, Tensor value, Tensor? depth_query, Tensor[] depth_keys, "
        "Tensor[] depth_values, Tensor? mask, Tensor? gate, bool causal, float scale, SymInt? window, str impl) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_forward_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# As in `attn_res_ops`: a second copy of this file uses the ops of the first.
if not hasattr(torch.ops.depthattn, "moda_attention"):
    _register_ops()
