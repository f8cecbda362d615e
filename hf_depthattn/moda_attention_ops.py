r"""Mixture-of-Depths Attention (MoDA): one softmax over the sequence and the slots of the query's own token.

Paper: arXiv 2603.15619, section 3. Notation as in `moda_depth_ops`. With a gate a per query head, for retrofitting:

    out = o_seq + a (o_joint - o_seq)      a = 0 is the host, a = 1 (or no gate) is the paper

`moda_attention` computes attention over the sequence with one of torch's fused kernels and merges the slots into it.
The backward calls the kernel's backward with the joint output and log-sum-exp (see `sequence_attention`). With a gate,
with w = exp(lse_seq - lse_joint) the weight of the sequence, g the upstream gradient and c = (1 - a) + a w,

    ds_j = p_seq_j (c g . v_j - c g . o')      o' = o_seq + (a w / c) (o_joint - o_seq)

which is the kernel's backward with upstream gradient c g, output o' and the log-sum-exp of the sequence; and
da = sum g . (o_joint - o_seq). The gradients of the slots are those of the joint softmax with upstream gradient a g.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .moda_depth_ops import MODA_DEPTH_BACKWARD, MODA_DEPTH_FORWARD
from .op_dispatch import resolve
from .sequence_attention import (
    SequenceInputs,
    aligns_last_query,
    causal_mask,
    find_kernel,
    sequence_backward,
    sequence_forward,
)

# Lower bound of c, which is near 0 if slots have nearly all weight or a gate is larger than 1: o' contains 1 / c in
# the dtype of the kernel. Gradients of tokens below the bound are themselves of that order.
_SMALLEST_FACTOR = {
    torch.float16: 2.0**-12,
    torch.bfloat16: 2.0**-40,
    torch.float32: 2.0**-40,
    torch.float64: 2.0**-80,
}


class ModaInputs(NamedTuple):
    """The inputs and options of attention with slots.

    Attributes:
        query: queries, [B, Hq, T, d].
        key: keys of the sequence, [B, Hk, S, d].
        value: values of the sequence, [B, Hk, S, dv].
        depth_keys: keys of L slots, each [B, Hk, T, d].
        depth_values: values of L slots, each [B, Hk, T, dv].
        scale: factor on q . k, for the sequence and the slots.
        depth_query: query for the slots, [B, Hq, T, d], if it differs from `query`.
        mask: mask of the sequence, [B or 1, Hq or 1, T, S], bool (True: attend) or additive.
        causal: causal mask, aligned so that the last query attends to all keys; not allowed with a mask.
        window: size of the sliding window in tokens, including the query's own; only on a GPU and with `causal`.
        gate: gate per query head, [Hq], or `None` without a gate.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    depth_keys: Sequence[Tensor]
    depth_values: Sequence[Tensor]
    scale: float
    depth_query: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    gate: Tensor | None = None

    def sequence(self) -> SequenceInputs:
        """Return the inputs of attention over the sequence."""
        return SequenceInputs(self.query, self.key, self.value, self.mask, self.causal, self.scale, self.window)

    def depth(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the inputs of attention to the slots: query, keys and values."""
        query = self.query if self.depth_query is None else self.depth_query
        return query, list(self.depth_keys), list(self.depth_values)


def moda_attention(inputs: ModaInputs, *, kernel: str | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute attention over the sequence and the slots in one softmax (arXiv 2603.15619, section 3).

    Args:
        inputs: query, keys, values, slots and options.
        kernel: kernel for the sequence, as returned by `find_kernel`, which is called by default.
        impl: `"auto"`, `"torch"` or `"triton"`, for the slots.

    Returns:
        The output [B, T, Hq, dv], and the detached joint log-sum-exp [B, Hq, T].

    Raises:
        ValueError: if shapes do not match, or no fused kernel supports the inputs (use `moda_attention_reference`).
    """
    _check(inputs)
    if kernel is None:
        kernel = find_kernel(inputs.query, inputs.mask, inputs.window)
    if kernel is None:
        raise ValueError(
            f"there is no fused kernel for {inputs.query.dtype} on {inputs.query.device.type!r} with "
            f"mask={inputs.mask is not None} and window={inputs.window}; use `moda_attention_reference` "
            "(attn_implementation='eager')."
        )
    num_tokens, num_keys = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.causal and num_keys != num_tokens and not aligns_last_query(kernel):
        inputs = inputs._replace(mask=causal_mask(num_tokens, num_keys, inputs.query.device), causal=False)
    inputs = inputs._replace(depth_keys=list(inputs.depth_keys), depth_values=list(inputs.depth_values))
    out, lse, *_ = torch.ops.depthattn.moda_fused_attention(*inputs, kernel, impl)
    return out, lse


def moda_attention_reference(
    inputs: ModaInputs, *, sinks: Tensor | None = None, softcap: float | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `moda_attention` by the equation of the paper: one softmax over all logits, with autograd.

    It is used for `attn_implementation="eager"`, which returns weights, and supports logit soft-capping, attention
    sinks and dropout. It rounds like transformers' eager attention: the softmax is float32 (float64 for float64),
    products have the dtype of the inputs.

    Args:
        inputs: as in `moda_attention`, without a window.
        sinks: attention sinks, [Hq]: one logit per head that is part of the softmax but has no value.
        softcap: every logit s is replaced by `softcap * tanh(s / softcap)` before the mask.
        dropout: dropout probability of the weights.

    Returns:
        The output [B, T, Hq, dv], and the weights, after dropout and gate, of the sequence [B, Hq, T, S] and of the
        slots [B, Hq, T, L].
    """
    _check(inputs)
    assert inputs.window is None, "the mask must contain the window"
    query, scale, mask, gate = inputs.query, inputs.scale, inputs.mask, inputs.gate
    num_groups = query.shape[1] // inputs.key.shape[1]
    key, value = (x.repeat_interleave(num_groups, 1) for x in (inputs.key, inputs.value))  # [B, Hq, S, d]
    seq_logits = _capped(torch.matmul(query, key.transpose(2, 3)) * scale, softcap)  # [B, Hq, T, S]
    if inputs.causal:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        seq_logits = seq_logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else seq_logits + mask
    # [B, Hq, T, L]; each slot is repeated for the heads of its group.
    depth_query, depth_keys, depth_values = inputs.depth()
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
    """Return `seq_out + gate (joint - seq_out)` for [B, T, Hq, dv] and a gate that can be expanded to that shape.

    It is computed in float32 or float64.
    """
    wide = torch.float64 if joint.dtype == torch.float64 else torch.float32
    return torch.lerp(seq_out.to(wide), joint.to(wide), gate.to(wide)).to(joint.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if not softcap else torch.tanh(logits / softcap) * softcap


def _softmax(columns: list[Tensor], dropout: float) -> Tensor:
    logits = torch.cat(columns, -1)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # A token that attends to nothing has zero weights, not NaN.
    weights = torch.softmax(logits, -1, dtype=wide).nan_to_num(0.0).to(logits.dtype)
    return torch.nn.functional.dropout(weights, dropout) if dropout else weights


def _check(inputs: ModaInputs) -> None:
    batch, num_heads, num_tokens, head_dim = inputs.query.shape
    num_kv_heads = inputs.key.shape[1]
    depth_keys, depth_values, gate = inputs.depth_keys, inputs.depth_values, inputs.gate
    if num_heads % num_kv_heads:
        raise ValueError(
            f"`key` must have a number of heads that divides the {num_heads} of `query`, got {num_kv_heads}"
        )
    if len(depth_keys) != len(depth_values):
        raise ValueError(f"got {len(depth_keys)} `depth_keys` but {len(depth_values)} `depth_values`")
    value_dim = inputs.value.shape[-1]
    for name, slots, dim in (("depth_keys", depth_keys, head_dim), ("depth_values", depth_values, value_dim)):
        for slot in slots:
            if slot.shape != (batch, num_kv_heads, num_tokens, dim):
                raise ValueError(
                    f"`{name}` must have the shape {(batch, num_kv_heads, num_tokens, dim)} (batch, key-value heads, "
                    f"tokens of this call, head dimension), got {tuple(slot.shape)}"
                )
    if gate is not None and gate.shape != (num_heads,):
        raise ValueError(f"`gate` must have the shape {(num_heads,)}, one per query head, got {tuple(gate.shape)}")


class _Saved(NamedTuple):
    """Outputs saved for the backward; the last two are empty without a gate."""

    joint: Tensor
    lse: Tensor
    seq_out: Tensor
    seq_lse: Tensor


def _forward(inputs: ModaInputs, kernel: str, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out, lse_joint, o_joint, o_seq and lse_seq; the last three are empty without a gate (out is o_joint)."""
    gate = inputs.gate
    seq_out, seq_lse = sequence_forward(inputs.sequence(), kernel)
    depth = inputs.depth()
    merge = resolve(MODA_DEPTH_FORWARD, impl, inputs.query.device, depth)
    joint, lse = merge(*depth, seq_out, seq_lse, inputs.scale, 0.0)
    if gate is None:
        return joint, lse, joint.new_empty(0), joint.new_empty(0), joint.new_empty(0)
    seq_out = seq_out.transpose(1, 2).contiguous()
    out = gated(seq_out, joint, gate[:, None])
    return out, lse, joint, seq_out, seq_lse.contiguous()


def _backward(
    grad_out: Tensor, inputs: ModaInputs, saved: _Saved, kernel: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    """Return the gradients of query, key, value, depth query (may be empty), slots and gate (may be empty)."""
    joint, lse, seq_out, seq_lse = saved
    gate = inputs.gate
    seq_grad, slot_grad, kernel_out, kernel_lse = grad_out, grad_out, joint, lse
    grad_gate = grad_out.new_empty(0)
    if gate is not None:
        wide_grad = grad_out.to(lse.dtype)
        head_gate = gate.to(lse.dtype)[:, None]  # [Hq, 1]
        seq_weight = (seq_lse - lse).exp_().transpose(1, 2).unsqueeze(-1)  # [B, T, Hq, 1]
        factor = (1 - head_gate) + head_gate * seq_weight
        smallest = _SMALLEST_FACTOR[grad_out.dtype]
        factor = torch.where(factor.abs() < smallest, smallest, factor)
        kernel_out = gated(seq_out, joint, head_gate * seq_weight / factor)
        # For a token that attends to nothing, any finite value gives zero weights; the kernel's own is 0.
        kernel_lse = seq_lse.masked_fill(seq_lse.isneginf(), 0.0)
        seq_grad = (factor * wide_grad).to(grad_out.dtype)
        slot_grad = (head_gate * wide_grad).to(grad_out.dtype)
        difference = joint.to(lse.dtype) - seq_out
        grad_gate = difference.mul_(wide_grad).sum((0, 1, 3)).to(gate.dtype)
    grad_query, grad_key, grad_value = sequence_backward(
        seq_grad.transpose(1, 2), inputs.sequence(), kernel_out.transpose(1, 2), kernel_lse, kernel
    )
    depth = inputs.depth()
    backward = resolve(MODA_DEPTH_BACKWARD, impl, inputs.query.device, depth)
    depth_grad_query, grad_depth_keys, grad_depth_values = backward(slot_grad, *depth, joint, lse, inputs.scale, 0.0)
    if inputs.depth_query is None:
        grad_query, depth_grad_query = depth_grad_query.add_(grad_query), grad_out.new_empty(0)
    return (
        _laid_out_as(inputs.query, grad_query),
        _laid_out_as(inputs.key, grad_key),
        _laid_out_as(inputs.value, grad_value),
        depth_grad_query,
        grad_depth_keys,
        grad_depth_values,
        grad_gate,
    )


def _laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of `x` with the strides of `torch.empty_like(x)`, as autograd needs it for a leaf."""
    laid_out = torch.empty_like(x)
    return gradient if gradient.stride() == laid_out.stride() else laid_out.copy_(gradient)


def _forward_fake(inputs: ModaInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query = inputs.query
    batch, num_heads, num_tokens, _ = query.shape
    out = query.new_empty(batch, num_tokens, num_heads, inputs.value.shape[-1])
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(batch, num_heads, num_tokens, dtype=wide)
    if inputs.gate is None:
        return out, lse, query.new_empty(0), query.new_empty(0), query.new_empty(0)
    return out, lse, torch.empty_like(out), torch.empty_like(out), torch.empty_like(lse)


def _backward_fake(
    grad_out: Tensor, inputs: ModaInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    depth_query, gate = inputs.depth_query, inputs.gate
    return (
        torch.empty_like(inputs.query),
        torch.empty_like(inputs.key),
        torch.empty_like(inputs.value),
        grad_out.new_empty(0) if depth_query is None else torch.empty_like(depth_query),
        [torch.empty_like(slot) for slot in inputs.depth_keys],
        [torch.empty_like(slot) for slot in inputs.depth_values],
        grad_out.new_empty(0) if gate is None else torch.empty_like(gate),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, ctx.kernel, ctx.impl = inputs
    given = ModaInputs(*fields)
    out, lse, joint, seq_out, seq_lse = output
    ctx.mark_non_differentiable(lse, joint, seq_out, seq_lse)
    # Without a gate, the output is that of the joint softmax.
    saved = _Saved(out if given.gate is None else joint, lse, seq_out, seq_lse)
    ctx.scale, ctx.causal, ctx.window, ctx.num_slots = given.scale, given.causal, given.window, len(given.depth_keys)
    tensors = given.query, given.key, given.value, given.depth_query, given.mask, given.gate
    ctx.save_for_backward(*tensors, *saved, *given.depth_keys, *given.depth_values)


def _differentiate(ctx: Any, grad_out: Tensor, *_: object) -> tuple[Any, ...]:
    query, key, value, depth_query, mask, gate, *rest = ctx.saved_tensors
    saved, slots = rest[: len(_Saved._fields)], rest[len(_Saved._fields) :]
    keys, values = slots[: ctx.num_slots], slots[ctx.num_slots :]
    given = ModaInputs(query, key, value, keys, values, ctx.scale, depth_query, mask, ctx.causal, ctx.window, gate)
    *of_sequence, of_depth_query, of_keys, of_values, of_gate = torch.ops.depthattn.moda_fused_attention_backward(
        grad_out.contiguous(), *given, *saved, ctx.kernel, ctx.impl
    )
    gradients = dict.fromkeys(ModaInputs._fields)
    gradients |= zip(("query", "key", "value"), of_sequence, strict=True)
    gradients |= {"depth_keys": of_keys, "depth_values": of_values}
    if depth_query is not None:
        gradients["depth_query"] = of_depth_query
    if gate is not None:
        gradients["gate"] = of_gate
    return *gradients.values(), None, None


def _register_ops() -> None:
    inputs = (
        "Tensor query, Tensor key, Tensor value, Tensor[] depth_keys, Tensor[] depth_values, float scale, "
        "Tensor? depth_query, Tensor? mask, bool causal, SymInt? window, Tensor? gate"
    )
    num_inputs = len(ModaInputs._fields)
    num_saved = len(_Saved._fields)

    def run_backward(grad_out: Tensor, *flat: Any) -> tuple[Any, ...]:
        given, saved = ModaInputs(*flat[:num_inputs]), _Saved(*flat[num_inputs : num_inputs + num_saved])
        return _backward(grad_out, given, saved, *flat[num_inputs + num_saved :])

    backward = torch.library.custom_op(
        "depthattn::moda_fused_attention_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor grad_out, {inputs}, Tensor joint, Tensor lse, Tensor seq_out, Tensor seq_lse, str kernel, "
        "str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    )
    backward.register_fake(lambda grad_out, *flat: _backward_fake(grad_out, ModaInputs(*flat[:num_inputs])))
    forward = torch.library.custom_op(
        "depthattn::moda_fused_attention",
        lambda *flat: _forward(ModaInputs(*flat[:num_inputs]), *flat[num_inputs:]),
        mutates_args=(),
        schema=f"({inputs}, str kernel, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda *flat: _forward_fake(ModaInputs(*flat[:num_inputs])))
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A second copy of this file must use the ops of the first, see `attn_res_ops`.
if not hasattr(torch.ops.depthattn, "moda_fused_attention"):
    _register_ops()
