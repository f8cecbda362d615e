r"""Mixture-of-Depths Attention (MoDA), the depth part: attention of every token to its own slots.

Paper: arXiv 2603.15619, section 3. Notation of this file and of `moda_attention_ops`:

    B, T          batch, tokens of this call
    Hq, Hk, G     query heads, key-value heads, G = Hq / Hk; query head h shares key-value head h // G
    d, dv         dimension of queries and keys, of values
    L             number of slots, oldest first: the keys and values that earlier sublayers wrote for the same token
    s_j, s_i      logits, scale * q . k: over the sequence (j) and over the slots (i)
    lse           natural log of the sum of exp(logits)
    seq, joint    over the sequence alone; over sequence and slots in one softmax

    lse_joint = log(exp(lse_seq) + sum_i exp(s_i))
    o_joint   = exp(lse_seq - lse_joint) o_seq + sum_i exp(s_i - lse_joint) v_i

which is `(1 - p) o_seq + p o_depth` with `p = sigmoid(lse_depth - lse_seq)`. `moda_attention_reference` in
`moda_attention_ops` defines the results: it computes one softmax over all logits, as in the paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .kernels.moda_depth_ops import depth_backward_triton, depth_forward_triton, moda_depth_limit
from .op_dispatch import Op, register, resolve

# Number of slot elements per thread that are stacked at a time: large enough for batched matrix products, small enough
# to stay in cache. Of 2^15 to 2^20, 2^19 was fastest at B = 1, T = 1024, Hk = 2, d = 64, L = 16.
_CHUNK_ELEMENTS = 1 << 19
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 25


def moda_depth_merge(
    query: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    seq_out: Tensor,
    seq_lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Merge attention to the slots of every token into attention over the sequence (arXiv 2603.15619, section 3).

    This is for attention with a differentiable log-sum-exp (`flex_attention`). `moda_attention` supports kernels whose
    log-sum-exp is not differentiable.

    Args:
        query: queries, [B, Hq, T, d].
        depth_keys: keys of L slots, each [B, Hk, T, d].
        depth_values: values of L slots, each [B, Hk, T, dv].
        seq_out: output of attention over the sequence, [B, Hq, T, dv].
        seq_lse: its log-sum-exp, [B, Hq, T], float32 (float64 for float64); -inf for a token that attends to nothing.
        scale: factor on q . k.
        softcap: every logit s is replaced by `softcap * tanh(s / softcap)`.
        impl: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        The output [B, T, Hq, dv] in the dtype of `seq_out`, and its log-sum-exp [B, Hq, T].

    Raises:
        ValueError: if `seq_out` requires a gradient but `seq_lse` does not, since a part of the gradients of query and
            keys would be missing.
    """
    if seq_out.requires_grad and not seq_lse.requires_grad:
        raise ValueError(
            "`seq_lse` has no gradient but `seq_out` has: gradients of query and keys would lack the part through the "
            "log-sum-exp. Use `moda_attention` for attention kernels without this gradient."
        )
    if torch.compiler.is_exporting():
        # An exported program must run without this package and its ops.
        return _merge_reference(query, depth_keys, depth_values, seq_out, seq_lse, scale, softcap)
    out, lse = torch.ops.depthattn.moda_depth_merge(
        query, list(depth_keys), list(depth_values), seq_out, seq_lse, scale, softcap or 0.0, impl
    )
    return out, lse


def _merge_reference(
    query: Tensor,
    depth_keys: Sequence[Tensor],
    depth_values: Sequence[Tensor],
    seq_out: Tensor,
    seq_lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute `moda_depth_merge` by the equations of the module's docstring, with autograd; arguments as there."""
    num_groups = query.shape[1] // depth_keys[0].shape[1] if depth_keys else 1
    query, lse = query.to(seq_lse.dtype), seq_lse
    logits = [(query * key.repeat_interleave(num_groups, 1)).sum(-1) * scale for key in depth_keys]  # L x [B, Hq, T]
    if softcap:
        logits = [softcap * torch.tanh(logit / softcap) for logit in logits]
    for logit in logits:
        lse = torch.logaddexp(lse, logit)
    out = (seq_lse - lse).exp().unsqueeze(-1) * seq_out
    for logit, value in zip(logits, depth_values, strict=True):
        out = out + (logit - lse).exp().unsqueeze(-1) * value.repeat_interleave(num_groups, 1)
    return out.to(seq_out.dtype).transpose(1, 2), lse


_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def _without_autocast(
    function: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """Disable autocast within a function: it also applies within ops, whose products have the log-sum-exp's dtype."""

    @wraps(function)
    def run(first: Tensor, *arguments: _Rest.args, **options: _Rest.kwargs) -> _Result:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **options)

    return run


@_without_autocast
def depth_forward(
    query: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    seq_out: Tensor,
    seq_lse: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Compute `moda_depth_merge` in torch, without autograd, in chunks of tokens with their slots stacked.

    Args:
        query: as in `moda_depth_merge`.
        depth_keys: as in `moda_depth_merge`.
        depth_values: as in `moda_depth_merge`.
        seq_out: as in `moda_depth_merge`.
        seq_lse: as in `moda_depth_merge`.
        scale: as in `moda_depth_merge`.
        softcap: as in `moda_depth_merge`; 0 for none.

    Returns:
        The joint output [B, T, Hq, dv] and the joint log-sum-exp [B, Hq, T].
    """
    if not depth_keys:
        return seq_out.transpose(1, 2).clone(memory_format=torch.contiguous_format), seq_lse.clone()
    batch, num_heads, num_tokens, _ = query.shape
    num_kv_heads, value_dim = depth_values[0].shape[1], depth_values[0].shape[-1]
    out = seq_out.new_empty(batch, num_tokens, num_heads, value_dim)
    lse = torch.empty_like(seq_lse, memory_format=torch.contiguous_format)
    size = _chunk_size(depth_keys)
    buffer = _buffer(max(depth_keys, depth_values, key=lambda slots: slots[0].shape[-1]), size, lse.dtype)
    for chunk, (keys, values) in enumerate(zip(_split(depth_keys, size), _split(depth_values, size), strict=True)):
        tokens = slice(chunk * size, (chunk + 1) * size)
        q = _grouped(query, tokens, num_kv_heads).to(lse.dtype)  # [B, c, Hk, G, d]
        logits = _depth_logits(q, _gathered(keys, buffer), scale, softcap)  # [B, c, Hk, G, L]
        # Keys are not needed any more, so their buffer is reused for the values.
        mixed = torch.matmul(logits.softmax(-1), _gathered(values, buffer)).flatten(2, 3)  # [B, c, Hq, dv]
        depth_lse = logits.logsumexp(-1).flatten(2, 3)  # [B, c, Hq]
        chunk_lse = seq_lse[:, :, tokens].transpose(1, 2)
        seq_weight = torch.sigmoid(chunk_lse - depth_lse).unsqueeze(-1)
        out[:, tokens] = mixed.lerp_(seq_out[:, :, tokens].transpose(1, 2).to(lse.dtype), seq_weight)
        lse[:, :, tokens] = torch.logaddexp(depth_lse, chunk_lse).transpose(1, 2)
    return out, lse


@_without_autocast
def depth_backward(
    grad_out: Tensor,
    query: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the gradients of the depth part of the joint softmax in torch.

    With p_i = exp(s_i - lse) and g = dL/dout, as in attention over any set of keys:

        ds_i = p_i (g . v_i - g . out),   dq = scale sum_i ds_i k_i,   dk_i = scale ds_i q,   dv_i = p_i g

    where dk_i and dv_i are summed over the G query heads of a key-value head.

    Args:
        grad_out: gradient of the output, [B, T, Hq, dv].
        query: as in `moda_depth_merge`.
        depth_keys: as in `moda_depth_merge`.
        depth_values: as in `moda_depth_merge`.
        out: joint output, [B, T, Hq, dv].
        lse: joint log-sum-exp, [B, Hq, T].
        scale: as in `moda_depth_merge`.
        softcap: as in `moda_depth_merge`; 0 for none.

    Returns:
        The gradient of the query through the slots [B, Hq, T, d], and the gradients of the slots' keys and values.
    """
    if not depth_keys:
        return torch.zeros_like(query), [], []
    num_kv_heads = depth_keys[0].shape[1]
    grad_query = torch.empty_like(query)
    grad_keys = [torch.empty_like(key) for key in depth_keys]
    grad_values = [torch.empty_like(value) for value in depth_values]
    size = _chunk_size(depth_keys)
    key_buffer, value_buffer = (_buffer(slots, size, lse.dtype) for slots in (depth_keys, depth_values))
    parts = (_split(slots, size) for slots in (depth_keys, depth_values, grad_keys, grad_values))
    for chunk, (key_parts, value_parts, grad_key_parts, grad_value_parts) in enumerate(zip(*parts, strict=True)):
        tokens = slice(chunk * size, (chunk + 1) * size)
        keys, values = _gathered(key_parts, key_buffer), _gathered(value_parts, value_buffer)  # [B, c, Hk, L, d]
        q = _grouped(query, tokens, num_kv_heads).to(lse.dtype)  # [B, c, Hk, G, d]
        g = grad_out[:, tokens].unflatten(2, (num_kv_heads, -1)).to(lse.dtype)  # [B, c, Hk, G, dv]
        delta = (g * out[:, tokens].unflatten(2, (num_kv_heads, -1))).sum(-1, keepdim=True)
        logits = _depth_logits(q, keys, scale, softcap)  # [B, c, Hk, G, L]
        weights = (logits - lse[:, :, tokens].transpose(1, 2).unflatten(2, (num_kv_heads, -1)).unsqueeze(-1)).exp_()
        grad_logits = torch.matmul(g, values.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale)
        if softcap:
            grad_logits.mul_(1 - (logits / softcap).square())
        grad_query[:, :, tokens] = torch.matmul(grad_logits, keys).flatten(2, 3).transpose(1, 2)
        # Keys and values are not needed any more, so their buffers are reused for the gradients.
        torch.matmul(grad_logits.transpose(-1, -2), q, out=keys)
        torch.matmul(weights.transpose(-1, -2), g, out=values)
        torch._foreach_copy_([*grad_key_parts, *grad_value_parts], [*keys.unbind(3), *values.unbind(3)])
    return grad_query, grad_keys, grad_values


@_without_autocast
def depth_weights(query: Tensor, depth_keys: Sequence[Tensor], lse: Tensor, *, scale: float, softcap: float) -> Tensor:
    """Return the weight of every slot in the joint softmax, `exp(s_i - lse)`, detached.

    Args:
        query: as in `moda_depth_merge`.
        depth_keys: as in `moda_depth_merge`.
        lse: joint log-sum-exp, [B, Hq, T].
        scale: as in `moda_depth_merge`.
        softcap: as in `moda_depth_merge`; 0 for none.

    Returns:
        The weights, [B, Hq, T, L].
    """
    num_kv_heads = depth_keys[0].shape[1]
    with torch.no_grad():
        every_token = slice(None)
        keys = torch.stack([key.transpose(1, 2) for key in depth_keys], 3).to(lse.dtype)
        logits = _depth_logits(_grouped(query, every_token, num_kv_heads).to(lse.dtype), keys, scale, softcap)
        return (logits.flatten(2, 3).transpose(1, 2) - lse.unsqueeze(-1)).exp_()


def _grouped(x: Tensor, tokens: slice, num_kv_heads: int) -> Tensor:
    """Select c tokens and group query heads: [B, Hq, T, d] -> [B, c, Hk, G, d]."""
    grouped: Tensor = x[:, :, tokens].transpose(1, 2).unflatten(2, (num_kv_heads, -1))
    return grouped


def _depth_logits(q: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    logits = torch.matmul(q, keys.transpose(-1, -2)).mul_(scale)
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _chunk_size(slots: list[Tensor]) -> int:
    """Return the number of tokens whose slots are stacked at a time, about the same in every chunk."""
    num_tokens = slots[0].shape[2]
    on_cpu = slots[0].device.type == "cpu"
    num_elements = _CHUNK_ELEMENTS * torch.get_num_threads() if on_cpu else _ACCELERATOR_CHUNK_ELEMENTS
    num_chunks = max(1, -(-slots[0].numel() * len(slots) // num_elements))
    return max(1, -(-num_tokens // num_chunks))


def _split(slots: list[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the slots of every chunk of c tokens, each [B, c, Hk, d]; `Tensor.split` takes longer than `chunk`."""
    num_chunks = max(1, -(-slots[0].shape[2] // size))
    return zip(*(slot.transpose(1, 2).chunk(num_chunks, 1) for slot in slots), strict=True)


def _buffer(slots: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Allocate a buffer for the slots of a chunk, to be reused: page faults of new memory cost more than the copy."""
    batch, num_kv_heads, _, dim = slots[0].shape
    return slots[0].new_empty(batch * size * num_kv_heads * len(slots) * dim, dtype=dtype)


def _gathered(slots: tuple[Tensor, ...], buffer: Tensor) -> Tensor:
    """Stack the slots of a chunk to [B, c, Hk, L, d] in the buffer, with its dtype."""
    batch, num_tokens, num_kv_heads, dim = slots[0].shape
    shape = (batch, num_tokens, num_kv_heads, len(slots), dim)
    return torch.stack(slots, 3, out=buffer[: math.prod(shape)].view(shape))


MODA_DEPTH_FORWARD = register(Op("moda_depth_forward", depth_forward, depth_forward_triton, moda_depth_limit))
MODA_DEPTH_BACKWARD = register(Op("moda_depth_backward", depth_backward, depth_backward_triton, moda_depth_limit))


class _MergeInputs(NamedTuple):
    """The arguments of the op in the order of its schema; a softcap of 0 is none."""

    query: Tensor
    depth_keys: list[Tensor]
    depth_values: list[Tensor]
    seq_out: Tensor
    seq_lse: Tensor
    scale: float
    softcap: float
    impl: str


def _merge_forward(inputs: _MergeInputs) -> tuple[Tensor, Tensor]:
    forward = resolve(MODA_DEPTH_FORWARD, inputs.impl, inputs.query.device, inputs[:3])
    return forward(*inputs[:5], inputs.scale, inputs.softcap)


def _merge_backward(
    grad_out: Tensor, inputs: _MergeInputs, out: Tensor, lse: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """Compute all gradients: with w = exp(lse_seq - lse_joint), do_seq = w g and dlse_seq = w (g . (o_seq - out))."""
    seq_out, seq_lse = inputs.seq_out, inputs.seq_lse
    backward = resolve(MODA_DEPTH_BACKWARD, inputs.impl, inputs.query.device, inputs[:3])
    gradients = backward(grad_out, *inputs[:3], out, lse, inputs.scale, inputs.softcap)
    weight = (seq_lse - lse).exp_().transpose(1, 2).unsqueeze(-1)  # [B, T, Hq, 1]
    wide_grad = grad_out.to(lse.dtype)
    grad_seq_out = (weight * wide_grad).to(seq_out.dtype).transpose(1, 2).contiguous()
    difference = seq_out.transpose(1, 2).to(lse.dtype) - out
    grad_seq_lse = (weight * (wide_grad * difference).sum(-1, keepdim=True)).squeeze(-1).transpose(1, 2).contiguous()
    return *gradients, grad_seq_out, grad_seq_lse


def _merge_forward_fake(inputs: _MergeInputs) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, _ = inputs.query.shape
    seq_out, seq_lse = inputs.seq_out, inputs.seq_lse
    return seq_out.new_empty(batch, num_tokens, num_heads, seq_out.shape[-1]), seq_lse.new_empty(seq_lse.shape)


def _merge_backward_fake(inputs: _MergeInputs) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    return (
        torch.empty_like(inputs.query),
        [torch.empty_like(key) for key in inputs.depth_keys],
        [torch.empty_like(value) for value in inputs.depth_values],
        inputs.seq_out.new_empty(inputs.seq_out.shape),
        inputs.seq_lse.new_empty(inputs.seq_lse.shape),
    )


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, depth_keys, depth_values, seq_out, seq_lse, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.num_slots = len(depth_keys)
    ctx.save_for_backward(query, seq_out, seq_lse, out, lse, *depth_keys, *depth_values)


def _differentiate_merge(ctx: Any, grad_out: Tensor, _: object) -> tuple[Any, ...]:
    query, seq_out, seq_lse, out, lse, *slots = ctx.saved_tensors
    keys, values = slots[: ctx.num_slots], slots[ctx.num_slots :]
    gradients = torch.ops.depthattn.moda_depth_merge_backward(
        grad_out, query, keys, values, seq_out, seq_lse, out, lse, *ctx.options
    )
    return *gradients, None, None, None


def _merge_backward_op(grad_out: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    # In the schema, out and lse are between the tensors and the options.
    return _merge_backward(grad_out, _MergeInputs(*flat[:5], *flat[7:]), *flat[5:7])


def _merge_backward_op_fake(grad_out: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    return _merge_backward_fake(_MergeInputs(*flat[:5], *flat[7:]))


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::moda_depth_merge_backward",
        _merge_backward_op,
        mutates_args=(),
        schema="(Tensor grad_out, Tensor query, Tensor[] depth_keys, Tensor[] depth_values, Tensor seq_out, "
        "Tensor seq_lse, Tensor out, Tensor lse, float scale, float softcap, str impl) "
        "-> (Tensor, Tensor[], Tensor[], Tensor, Tensor)",
    )
    backward.register_fake(_merge_backward_op_fake)
    forward = torch.library.custom_op(
        "depthattn::moda_depth_merge",
        lambda *flat: _merge_forward(_MergeInputs(*flat)),
        mutates_args=(),
        schema="(Tensor query, Tensor[] depth_keys, Tensor[] depth_values, Tensor seq_out, Tensor seq_lse, "
        "float scale, float softcap, str impl) -> (Tensor, Tensor)",
    )
    forward.register_fake(lambda *flat: _merge_forward_fake(_MergeInputs(*flat)))
    forward.register_autograd(_differentiate_merge, setup_context=_save_merge)


# A second copy of this file must use the ops of the first, see `attn_res_ops`.
if not hasattr(torch.ops.depthattn, "moda_depth_merge"):
    _register_ops()
