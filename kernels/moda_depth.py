"""MoDA's depth part in Triton: attention of every token to its own slots, merged with attention over the sequence.

The equations are in `depth_forward` and `depth_backward` of `moda_depth_ops`. One program processes one token of one
key-value head with its G query heads, and loops over blocks of BL slots with small matrix products:

    S [BL, G] = K [BL, D] Q^T [D, G]       O^T [DV, G] += V^T [DV, BL] P [BL, G]

The online softmax starts from attention over the sequence, with maximum `seq_lse`, sum 1 and output `seq_out`, which
merges both. There are enough programs of one to four warps to saturate memory, and they spill no registers with Triton
3.6 and 3.9; variants with several tokens per program and batched products spilled from head dimension 128 on.

Slots are separate tensors with different strides (keys of an attention module, projections of an MLP). They are not
stacked: a table on the device contains the address and the strides of each. It is copied to the device in every call;
during CUDA graph capture, which does not allow such copies, a kernel writes it.
"""

from __future__ import annotations

from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit()
def _slot_pointers(
    table_ptr,
    slots,
    is_slot,
    b,
    h,
    t,
    like_ptr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Return the addresses [BL] of row (b, h, t) in a block of slots, as pointers of the type of `like_ptr`."""
    row = table_ptr + slots * COLUMNS + FIRST
    address = tl.load(row, mask=is_slot, other=0)
    stride_b = tl.load(row + 1, mask=is_slot, other=0)
    stride_h = tl.load(row + 2, mask=is_slot, other=0)
    stride_t = tl.load(row + 3, mask=is_slot, other=0)
    offsets = b * stride_b + h * stride_h + t * stride_t
    if IS_ALIGNED:
        address = tl.multiple_of(address, 16)
        offsets = tl.multiple_of(offsets, 8)
    return address.to(like_ptr.dtype) + offsets


# Kernels are not specialised on the number of tokens or slots, to avoid recompilation.
@jit(do_not_specialize=["num_tokens", "num_slots"])
def moda_depth_forward_kernel(
    query_ptr,
    table_ptr,
    seq_out_ptr,
    seq_lse_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    num_slots,
    scale,
    softcap,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    seq_out_stride_b,
    seq_out_stride_h,
    seq_out_stride_t,
    HK: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (tl.program_id(1) // HK).to(tl.int64)
    kv = (tl.program_id(1) % HK).to(tl.int64)
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    is_head = g < G
    head = kv * G + g

    query_rows = b * query_stride_b + t * query_stride_t + head * query_stride_h
    query = tl.load(
        query_ptr + query_rows[None, :] + d[:, None], mask=is_head[None, :] & (d < D)[:, None], other=0.0
    )  # [DP, GP]
    seq_out_rows = b * seq_out_stride_b + t * seq_out_stride_t + head * seq_out_stride_h
    is_value = is_head[None, :] & (dv < DV)[:, None]
    mixed = tl.load(seq_out_ptr + seq_out_rows[None, :] + dv[:, None], mask=is_value, other=0.0).to(WIDE)
    lse_rows = (b * HK * G + head) * num_tokens + t
    largest = tl.load(seq_lse_ptr + lse_rows, mask=is_head, other=0.0).to(WIDE)  # [GP]
    total = tl.full((GP,), 1.0, WIDE)

    for first in range(0, num_slots, BL):
        slots = first + tl.arange(0, BL)
        is_slot = slots < num_slots
        key_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, query_ptr, 0, 8, IS_ALIGNED)
        keys = tl.load(key_rows[:, None] + d[None, :], mask=is_slot[:, None] & (d < D)[None, :], other=0.0)
        value_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, query_ptr, 4, 8, IS_ALIGNED)
        values = tl.load(
            value_rows[None, :] + dv[:, None], mask=is_slot[None, :] & (dv < DV)[:, None], other=0.0
        )  # [DVP, BL]
        logits = tl.dot(keys, query, input_precision=PRECISION, out_dtype=WIDE) * scale  # [BL, GP]
        if HAS_SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        logits = tl.where(is_slot[:, None], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        weights = tl.exp(logits - new_largest[None, :])
        decay = tl.exp(largest - new_largest)
        total = total * decay + tl.sum(weights, 0)
        mixed = mixed * decay[None, :]
        mixed += tl.dot(values, weights.to(values.dtype), input_precision=PRECISION, out_dtype=WIDE)  # [DVP, GP]
        largest = new_largest

    out_rows = ((b * num_tokens + t) * HK * G + head) * DV
    out = (mixed / total[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_rows[None, :] + dv[:, None], out, mask=is_value)
    tl.store(lse_ptr + lse_rows, largest + tl.log(total), mask=is_head)


@jit(do_not_specialize=["num_tokens", "num_slots"])
def moda_depth_backward_kernel(
    grad_out_ptr,
    query_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    grad_query_ptr,
    num_tokens,
    num_slots,
    scale,
    softcap,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_t,
    HK: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (tl.program_id(1) // HK).to(tl.int64)
    kv = (tl.program_id(1) % HK).to(tl.int64)
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    is_head = g < G
    head = kv * G + g

    query_rows = b * query_stride_b + t * query_stride_t + head * query_stride_h
    is_query = is_head[:, None] & (d < D)[None, :]
    query = tl.load(query_ptr + query_rows[:, None] + d[None, :], mask=is_query, other=0.0)  # [GP, DP]
    out_offsets = (((b * num_tokens + t) * HK * G + head) * DV)[:, None] + dv[None, :]
    is_out = is_head[:, None] & (dv < DV)[None, :]
    grad = tl.load(grad_out_ptr + out_offsets, mask=is_out, other=0.0)  # [GP, DVP]
    out = tl.load(out_ptr + out_offsets, mask=is_out, other=0.0)
    delta = tl.sum(grad.to(WIDE) * out.to(WIDE), 1)  # [GP]
    lse = tl.load(lse_ptr + (b * HK * G + head) * num_tokens + t, mask=is_head, other=0.0).to(WIDE)
    grad_query = tl.zeros((GP, DP), WIDE)

    for first in range(0, num_slots, BL):
        slots = first + tl.arange(0, BL)
        is_slot = slots < num_slots
        is_key = is_slot[:, None] & (d < D)[None, :]
        is_value = is_slot[:, None] & (dv < DV)[None, :]
        key_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, query_ptr, 0, 16, IS_ALIGNED)
        keys = tl.load(key_rows[:, None] + d[None, :], mask=is_key, other=0.0)  # [BL, DP]
        value_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, query_ptr, 4, 16, IS_ALIGNED)
        values = tl.load(value_rows[:, None] + dv[None, :], mask=is_value, other=0.0)  # [BL, DVP]
        logits = tl.dot(query, tl.trans(keys), input_precision=PRECISION, out_dtype=WIDE) * scale  # [GP, BL]
        if HAS_SOFTCAP:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        weights = tl.where(is_head[:, None] & is_slot[None, :], tl.exp(logits - lse[:, None]), 0.0)
        grad_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, grad_query_ptr, 12, 16, IS_ALIGNED)
        grad_values = tl.dot(tl.trans(weights.to(values.dtype)), grad, input_precision=PRECISION, out_dtype=WIDE)
        tl.store(grad_rows[:, None] + dv[None, :], grad_values.to(grad_query_ptr.dtype.element_ty), mask=is_value)
        grad_weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION, out_dtype=WIDE)
        grad_logits = weights * (grad_weights - delta[:, None]) * scale
        if HAS_SOFTCAP:
            grad_logits = grad_logits * (1 - (logits / softcap) * (logits / softcap))
        rounded = grad_logits.to(keys.dtype)
        grad_query += tl.dot(rounded, keys, input_precision=PRECISION, out_dtype=WIDE)
        grad_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, grad_query_ptr, 8, 16, IS_ALIGNED)
        grad_keys = tl.dot(tl.trans(rounded), query, input_precision=PRECISION, out_dtype=WIDE)
        tl.store(grad_rows[:, None] + d[None, :], grad_keys.to(grad_query_ptr.dtype.element_ty), mask=is_key)

    grad_query_rows = b * grad_query_stride_b + t * grad_query_stride_t + head * grad_query_stride_h
    tl.store(
        grad_query_ptr + grad_query_rows[:, None] + d[None, :],
        grad_query.to(grad_query_ptr.dtype.element_ty),
        mask=is_query,
    )
