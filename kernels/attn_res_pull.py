r"""Gradient of a source from all reads of it, in one pass ("pull").

Autograd adds the gradients of N reads to that of a source one after another, and each addition loads and stores a
whole matrix. Here, the backward of every read l only keeps dL/dh_l and three numbers per token and source. Then,

    dL/dv = direct + sum_l (a_l dL/dh_l + b_l w_l) + (sum_l c_l) v
    a_l = read_scale_l p_l,  b_l = ds_l r,  c_l = -ds_l s_l r^2 / D         (notation of `attn_res_read_backward`)

is computed in one pass. `direct` is the gradient of v from other uses.
"""

from __future__ import annotations

from .launches import matrix_pointer
from .row_tiles import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "num_reads"])
def attn_res_pull_kernel(
    table_ptr,
    source_ptr,
    direct_ptr,
    weight_like_ptr,
    grad_ptr,
    num_tokens,
    num_reads,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dL/dv for BLOCK_T tokens and BLOCK_D channels.

    Args:
        table_ptr: [reads, 4], addresses of dL/dh [tokens, D], a [tokens] and w [D], and the stride in elements from a
            to b and from b to c.
        source_ptr: v [tokens, D].
        direct_ptr: [tokens, D] or None.
        weight_like_ptr: any w, for the dtype of sums, which is that of a, b, c and w.
        grad_ptr: output, [tokens, D].
    """
    dtype: tl.constexpr = weight_like_ptr.dtype.element_ty
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = tokens < num_tokens
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = columns < D
    offsets = tokens[:, None] * D + columns[None, :]
    is_element = in_range[:, None] & is_column[None, :]
    if direct_ptr is None:
        total = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    else:
        total = tl.load(direct_ptr + offsets, mask=is_element, other=0.0).to(dtype)
    to_value = tl.zeros([BLOCK_T], dtype)
    for read in range(0, num_reads):
        grad = tl.load(matrix_pointer(table_ptr, read, 0, 4, source_ptr) + offsets, mask=is_element, other=0.0)
        numbers = tl.load(table_ptr + read * 4 + 1).to(weight_like_ptr.dtype) + tokens
        stride = tl.load(table_ptr + read * 4 + 3)
        weight_ptr = matrix_pointer(table_ptr, read, 2, 4, weight_like_ptr)
        weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
        to_grad = tl.load(numbers, mask=in_range, other=0.0)
        to_weight = tl.load(numbers + stride, mask=in_range, other=0.0)
        to_value += tl.load(numbers + 2 * stride, mask=in_range, other=0.0)
        total += grad.to(dtype) * to_grad[:, None] + weight[None, :] * to_weight[:, None]
    value = tl.load(source_ptr + offsets, mask=is_element, other=0.0).to(dtype)
    total += value * to_value[:, None]
    tl.store(grad_ptr + offsets, total.to(grad_ptr.dtype.element_ty), mask=is_element)
