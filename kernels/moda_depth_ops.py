"""MoDA's depth part on a GPU: supported inputs and launches.

`depth_forward_triton` and `depth_backward_triton` have the signatures of the torch implementations in `moda_depth_ops`
of `hf_depthattn`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launches import device_table, on_device, tensor_limit
from .moda_depth import moda_depth_backward_kernel, moda_depth_forward_kernel
from .moda_depth_configs import BACKWARD_CONFIGS, FORWARD_CONFIGS, MAX_REGISTERS, DepthConfig
from .row_tiles import INTERPRETED

try:
    import triton.language as tl
except ImportError:
    tl = None


# Maximum size of the second axis of a grid.
_MAX_GRID_Y = 65535


def moda_depth_limit(query: Tensor, depth_keys: list[Tensor], depth_values: list[Tensor]) -> str | None:
    """Return why the kernels do not support these inputs, or None if they do."""
    limit = tensor_limit("query", query)
    if limit is not None:
        return limit
    widest = max(BACKWARD_CONFIGS[2 if INTERPRETED else query.element_size()])
    for name, x in (("keys", query), *(("values", value) for value in depth_values[:1])):
        if x.shape[-1] > widest:
            return f"{name} must have at most {widest} dimensions per head in {query.dtype}, got {x.shape[-1]}"
    num_programs = query.shape[0] * (depth_keys[0].shape[1] if depth_keys else 1)
    if num_programs > _MAX_GRID_Y:
        return f"batch times key-value heads must be at most {_MAX_GRID_Y}, got {num_programs}"
    # On gfx942, the forward spills registers.
    return "AMD GPUs are not supported" if torch.version.hip else None


def depth_forward_triton(
    query: Tensor,
    depth_keys: list[Tensor],
    depth_values: list[Tensor],
    seq_out: Tensor,
    seq_lse: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Merge attention to the slots of every token into attention over the sequence (arXiv 2603.15619, section 3).

    Args:
        query: queries, [B, Hq, T, d].
        depth_keys: keys of L slots, each [B, Hk, T, d].
        depth_values: values of L slots, each [B, Hk, T, dv].
        seq_out: output of attention over the sequence, [B, Hq, T, dv].
        seq_lse: its log-sum-exp, [B, Hq, T].
        scale: factor on q . k.
        softcap: every logit s is replaced by `softcap * tanh(s / softcap)`; 0 for none.

    Returns:
        The output [B, T, Hq, dv] and its log-sum-exp [B, Hq, T].
    """
    batch, num_heads, num_tokens, _ = query.shape
    out = seq_out.new_empty(batch, num_tokens, num_heads, seq_out.shape[-1])
    lse = torch.empty_like(seq_lse, memory_format=torch.contiguous_format)
    if not depth_keys or not num_tokens:
        # Copies, since an op must not return its inputs.
        return seq_out.transpose(1, 2).clone(memory_format=torch.contiguous_format), seq_lse.clone()
    query, seq_out = _with_unit_stride(query), _with_unit_stride(seq_out.to(query.dtype))
    keys, values = _slots(query, depth_keys), _slots(query, depth_values)
    meta, grid = _launch(FORWARD_CONFIGS, query, keys, values, softcap, 8, (query, seq_out, *keys, *values))
    with on_device(query):
        moda_depth_forward_kernel[grid](
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
    """Compute the gradients of `depth_forward_triton`; deterministic, since every gradient is written by one program.

    Args:
        grad_out: gradient of the output, [B, T, Hq, dv].
        query: as in the forward.
        depth_keys: as in the forward.
        depth_values: as in the forward.
        out: joint output, [B, T, Hq, dv].
        lse: joint log-sum-exp, [B, Hq, T].
        scale: as in the forward.
        softcap: as in the forward.

    Returns:
        The gradient of the query through the slots, and the gradients of the slots' keys and values.
    """
    if not depth_keys or not query.numel():
        no_keys, no_values = ([torch.zeros_like(x) for x in slots] for slots in (depth_keys, depth_values))
        return torch.zeros_like(query), no_keys, no_values
    query = _with_unit_stride(query)
    keys, values = _slots(query, depth_keys), _slots(query, depth_values)
    grad_query = torch.empty_like(query)
    grad_keys, grad_values = [torch.empty_like(k) for k in keys], [torch.empty_like(v) for v in values]
    tensors = (query, grad_query, *keys, *values, *grad_keys, *grad_values)
    # The products for dk and dv sum over the G heads; `tl.dot` needs at least 16 with 16-bit inputs.
    meta, grid = _launch(BACKWARD_CONFIGS, query, keys, values, softcap, 16, tensors)
    with on_device(query):
        moda_depth_backward_kernel[grid](
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
    """Return the table with one row per slot: address and strides (batch, head, token) of each of its tensors."""
    slots = zip(*lists, strict=True)
    return device_table(device, [number for slot in slots for x in slot for number in (x.data_ptr(), *x.stride()[:3])])


def _launch(
    configs: dict[int, dict[int, DepthConfig]],
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    softcap: float,
    smallest_group: int,
    tensors: tuple[Tensor, ...],
) -> tuple[dict, tuple[int, int]]:
    """Return the compile-time arguments and the grid of a launch."""
    batch, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads, value_dim = values[0].shape[1], values[0].shape[-1]
    key_width, value_width = _padded(head_dim), _padded(value_dim)
    # The interpreter has no registers to spill and supports any size.
    config = configs[2 if INTERPRETED else query.element_size()][max(key_width, value_width)]
    group = num_heads // num_kv_heads
    meta = {
        "HK": num_kv_heads,
        "G": group,
        "GP": max(smallest_group, _next_power_of_2(group)),
        "D": head_dim,
        "DP": key_width,
        "DV": value_dim,
        "DVP": value_width,
        "BL": config.num_slots,
        "HAS_SOFTCAP": bool(softcap),
        # Rows at multiples of 16 bytes are loaded with 16-byte instructions.
        "IS_ALIGNED": all(_is_aligned(x) for x in tensors),
        "WIDE": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "PRECISION": config.precision,
        "num_warps": config.num_warps,
    }
    if not INTERPRETED:
        # From Triton 3.10 on, multiplications and additions are not fused by default.
        meta |= {"enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}
    return meta, (num_tokens, batch * num_kv_heads)


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])


def _padded(dim: int) -> int:
    return max(16, _next_power_of_2(dim))


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
