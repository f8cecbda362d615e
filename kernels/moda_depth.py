"""MoDA's depth part in Triton: every token's query against its own depth slots, joined to the sequence part.

Same functions as `depth_forward` and `depth_backward` of `moda_ops`, which say what is computed. One program takes one
token of one key-value head, with its G query heads; slots go by in blocks of BL, the rows of small matrix products:

    S [BL, G] = K [BL, D] Q^T [D, G]       O^T [DV, G] += V^T [DV, BL] P [BL, G]

The running softmax starts from the sequence part: maximum `seq_lse`, sum 1, output `seq_out`. That is the merge.
Programs of one to four warps are many enough to keep memory busy, and spill no register with Triton 3.6 and 3.9; forms
with several tokens per program and batched products did, from head dimension 128 on.

Slots are separate tensors with strides of their own (keys of an attention module, projections of an MLP) and are not
brought together: a table on the device holds the address and the strides of each. A table costs one small copy to the
device per call, so these launches cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Bytes of an element -> padded head dimension -> (slots in a block, warps), forward and backward. No register spills
# on sm_80, sm_90 and sm_100 with Triton 3.6 and 3.9 (tests/test_kernels_moda.py); not timed yet. float32 products run
# on ordinary cores and need more registers: beyond 64 no choice was free of spills.
FORWARD_CONFIGS = {
    2: {16: (16, 1), 32: (16, 2), 64: (16, 1), 128: (16, 2), 256: (16, 2)},
    4: {16: (16, 4), 32: (16, 4), 64: (16, 4)},
}
BACKWARD_CONFIGS = {
    2: {16: (16, 1), 32: (16, 1), 64: (16, 1), 128: (16, 2), 256: (16, 8)},
    4: {16: (16, 4), 32: (16, 8), 64: (16, 8)},
}

if triton is not None:

    @triton.jit
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
        """Addresses [BL] of the rows (b, h, t) of a block of slots; `like_ptr` has their type."""
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

    @triton.jit
    def _forward_kernel(
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
            logits = tl.dot(keys, query, input_precision="ieee", out_dtype=WIDE) * scale  # [BL, GP]
            if HAS_SOFTCAP:
                logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
            logits = tl.where(is_slot[:, None], logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 0))
            weights = tl.exp(logits - new_largest[None, :])
            decay = tl.exp(largest - new_largest)
            total = total * decay + tl.sum(weights, 0)
            mixed = mixed * decay[None, :]
            mixed += tl.dot(values, weights.to(values.dtype), input_precision="ieee", out_dtype=WIDE)  # [DVP, GP]
            largest = new_largest

        out_rows = ((b * num_tokens + t) * HK * G + head) * DV
        out = (mixed / total[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_rows[None, :] + dv[:, None], out, mask=is_value)
        tl.store(lse_ptr + lse_rows, largest + tl.log(total), mask=is_head)

    @triton.jit
    def _backward_kernel(
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
            logits = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=WIDE) * scale  # [GP, BL]
            if HAS_SOFTCAP:
                logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
            weights = tl.where(is_head[:, None] & is_slot[None, :], tl.exp(logits - lse[:, None]), 0.0)
            grad_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, grad_query_ptr, 12, 16, IS_ALIGNED)
            grad_values = tl.dot(tl.trans(weights.to(values.dtype)), grad, input_precision="ieee", out_dtype=WIDE)
            tl.store(grad_rows[:, None] + dv[None, :], grad_values.to(grad_query_ptr.dtype.element_ty), mask=is_value)
            grad_weights = tl.dot(grad, tl.trans(values), input_precision="ieee", out_dtype=WIDE)
            grad_logits = weights * (grad_weights - delta[:, None]) * scale
            if HAS_SOFTCAP:
                grad_logits = grad_logits * (1 - (logits / softcap) * (logits / softcap))
            rounded = grad_logits.to(keys.dtype)
            grad_query += tl.dot(rounded, keys, input_precision="ieee", out_dtype=WIDE)
            grad_rows = _slot_pointers(table_ptr, slots, is_slot, b, kv, t, grad_query_ptr, 8, 16, IS_ALIGNED)
            grad_keys = tl.dot(tl.trans(rounded), query, input_precision="ieee", out_dtype=WIDE)
            tl.store(grad_rows[:, None] + d[None, :], grad_keys.to(grad_query_ptr.dtype.element_ty), mask=is_key)

        grad_query_rows = b * grad_query_stride_b + t * grad_query_stride_t + head * grad_query_stride_h
        tl.store(
            grad_query_ptr + grad_query_rows[:, None] + d[None, :],
            grad_query.to(grad_query_ptr.dtype.element_ty),
            mask=is_query,
        )


def depth_forward_triton(
    query: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    seq_out: Tensor,
    seq_lse: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`moda_ops.depth_forward` on a GPU; shapes as there.

    Args:
        query: [B, Hq, T, d].
        depth_keys: L tensors [B, Hk, T, d].
        depth_values: L tensors [B, Hk, T, dv].
        seq_out: [B, Hq, T, dv].
        seq_lse: [B, Hq, T].
        scale: factor on q . k.
        softcap: `softcap * tanh(s / softcap)` in place of s; 0 for none.

    Returns:
        `out` [B, T, Hq, dv] and its log-sum-exp [B, Hq, T].

    Raises:
        RuntimeError: for a dtype or head dimension that the kernels do not have, naming the limit.
    """
    batch, num_heads, num_tokens, _ = query.shape
    out = seq_out.new_empty(batch, num_tokens, num_heads, seq_out.shape[-1])
    lse = torch.empty_like(seq_lse, memory_format=torch.contiguous_format)
    if not depth_keys or not num_tokens:
        return seq_out.transpose(1, 2).contiguous(), seq_lse.contiguous()
    query, seq_out = _with_unit_stride(query), _with_unit_stride(seq_out.to(query.dtype))
    keys, values = _slots(query, depth_keys), _slots(query, depth_values)
    meta, grid = _launch(FORWARD_CONFIGS, query, keys, values, softcap, 8, (query, seq_out, *keys, *values))
    _forward_kernel[grid](
        query,
        _table(query.device, keys, values),
        seq_out,
        seq_lse.contiguous(),
        out,
        lse,
        num_tokens,
        len(keys),
        scale,
        softcap,
        *query.stride()[:3],
        *seq_out.stride()[:3],
        **meta,
    )
    return out, lse


def depth_backward_triton(
    grad_out: Tensor,
    query: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`moda_ops.depth_backward` on a GPU; deterministic, since every gradient is written by one program.

    Args:
        grad_out: [B, T, Hq, dv].
        query, depth_keys, depth_values, scale, softcap: as in the forward.
        out: [B, T, Hq, dv], the joint output.
        lse: [B, Hq, T], the joint log-sum-exp.

    Returns:
        The part of dq that comes from the slots, and the gradients of keys and values, slot by slot.

    Raises:
        RuntimeError: for a dtype or head dimension that the kernels do not have, naming the limit.
    """
    if not depth_keys or not query.numel():
        return torch.zeros_like(query), *([torch.zeros_like(x) for x in slots] for slots in (depth_keys, depth_values))
    query = _with_unit_stride(query)
    keys, values = _slots(query, depth_keys), _slots(query, depth_values)
    grad_query = torch.empty_like(query)
    grad_keys, grad_values = [torch.empty_like(k) for k in keys], [torch.empty_like(v) for v in values]
    tensors = (query, grad_query, *keys, *values, *grad_keys, *grad_values)
    # The products for dk and dv sum over the G heads, of which 16-bit products need 16.
    meta, grid = _launch(BACKWARD_CONFIGS, query, keys, values, softcap, 16, tensors)
    _backward_kernel[grid](
        grad_out.to(query.dtype).contiguous(),
        query,
        _table(query.device, keys, values, grad_keys, grad_values),
        out.contiguous(),
        lse.contiguous(),
        grad_query,
        query.shape[2],
        len(keys),
        scale,
        softcap,
        *query.stride()[:3],
        *grad_query.stride()[:3],
        **meta,
    )
    return (
        grad_query,
        [grad.to(key.dtype) for grad, key in zip(grad_keys, depth_keys, strict=True)],
        [grad.to(value.dtype) for grad, value in zip(grad_values, depth_values, strict=True)],
    )


def _slots(query: Tensor, slots: list[Tensor]) -> list[Tensor]:
    return [_with_unit_stride(slot.to(query.dtype)) for slot in slots]


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(device: torch.device, *lists: list[Tensor]) -> Tensor:
    """Rows of slots: address and strides over batch, head and token of each tensor of the slot, int64."""
    rows = [[number for x in slot for number in (x.data_ptr(), *x.stride()[:3])] for slot in zip(*lists, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def _launch(
    configs: dict[int, dict[int, tuple[int, int]]],
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    softcap: float,
    smallest_group: int,
    tensors: tuple[Tensor, ...],
) -> tuple[dict, tuple[int, int]]:
    """Compile-time arguments and grid of a launch."""
    batch, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads, value_dim = values[0].shape[1], values[0].shape[-1]
    if query.dtype not in DTYPES and not (query.device.type == "cpu" and query.dtype == torch.float64):
        raise RuntimeError(f"impl='triton': MoDA's kernels have {', '.join(map(str, DTYPES))}, got {query.dtype}")
    key_width, value_width = (max(16, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    by_width = configs[2 if query.element_size() == 2 else 4]
    if query.device.type == "cpu":
        by_width = configs[2]
    if max(key_width, value_width) not in by_width:
        raise RuntimeError(
            f"impl='triton': MoDA's kernels have head dimensions up to {max(by_width)} in {query.dtype}, "
            f"got {head_dim} and {value_dim}"
        )
    slots, warps = by_width[max(key_width, value_width)]
    group = num_heads // num_kv_heads
    meta = {
        "HK": num_kv_heads,
        "G": group,
        "GP": max(smallest_group, triton.next_power_of_2(group)),
        "D": head_dim,
        "DP": key_width,
        "DV": value_dim,
        "DVP": value_width,
        "BL": slots,
        "HAS_SOFTCAP": bool(softcap),
        # Rows that start at multiples of 16 bytes are loaded 16 bytes at a time.
        "IS_ALIGNED": all(_is_aligned(x) for x in tensors),
        "WIDE": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "num_warps": warps,
    }
    if query.device.type != "cpu":
        meta["enable_fp_fusion"] = True
    return meta, (num_tokens, batch * num_kv_heads)


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
