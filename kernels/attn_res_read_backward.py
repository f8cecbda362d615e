r"""AttnRes read, backward: gradients of every source and, row by row, of the weights.

Notation of `attn_res_read`, p = softmax(s), g = read_scale * dL/dh, m = sum_i p_i v_i:

    delta = g . m
    ds_i  = p_i (g . v_i - delta)
    dv_i  = p_i g + ds_i r_i w - (ds_i s_i r_i^2 / D) v_i
    dw    = sum over tokens and i of ds_i r_i v_i

With a fused norm, out = rho * h * a with rho = 1 / sqrt(mean(h^2) + norm_eps), a its weight, and u = dL/dout * a:

    dL/dh = rho u - (rho^3 / D) (u . h) h,  da = sum over tokens of dL/dout * rho * h

There delta = rho^3 norm_eps (u . h) too, but only g . m has the rounding errors of g that ds is to be rid of.

Neither h nor the probabilities are kept from the forward: a first sweep over the sources forms m from the logits, with
no exchange between threads, and the second sweep, which finds the sources in cache, forms the gradients. Keeping h in
the storage dtype instead would put its rounding into delta, that is, into the difference that ds is made of.

A program walks over tokens with a stride. It keeps its share of dw in registers and writes it as one row at the end;
its row of da, needed once per token and not once per source, stays in cache. The rows are added up in a fixed order
afterwards: no atomics, the same bits in every run.
"""

from __future__ import annotations

from .row_tiles import (
    add_scaled,
    add_token_sum,
    convert_row,
    dot_rows,
    jit,
    load_chunk,
    load_row,
    load_vector,
    load_vector_chunk,
    multiply_rows,
    renew,
    scale_row,
    settle,
    store_chunk,
    store_row,
    store_token_sum,
    zero_row,
)

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit(do_not_specialize=["num_tokens", "num_sources", "first_source", "read_scale"])
def attn_res_read_backward_kernel(
    source_ptrs,
    grad_ptrs,
    grad_out_ptr,
    grad_partial_ptr,
    weight_ptr,
    norm_weight_ptr,
    stats_ptr,
    carry_ptr,
    delta_ptr,
    grad_weight_ptr,
    grad_norm_weight_ptr,
    coefficients_ptr,
    read_scale,
    num_tokens,
    num_sources,
    first_source,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    MIX_FROM: tl.constexpr,
    MIX_TO: tl.constexpr,
):
    """One launch does everything for the sources it gets; more sources than that take several (`attn_res_ops`).

    Args:
        source_ptrs: tuple of matrices [tokens, D], sources `first_source` and following.
        grad_ptrs: tuple of the matrices for their gradients; any pointer where none is needed.
        grad_out_ptr: [tokens, D], dL/dh, or dL/dout with a fused norm.
        grad_partial_ptr: [tokens, D] or None, added to the gradient of the last source.
        weight_ptr: w [D], of the dtype of the sums.
        norm_weight_ptr: a [D] or None.
        stats_ptr: [tokens, 3 + 2 N], written by the forward.
        carry_ptr: [tokens, D] of the dtype of the sums: between launches m, as far as it goes, and at last g; or None.
        delta_ptr: [tokens], between launches, or None.
        grad_weight_ptr: [programs, D], of the dtype of the sums; or None in a launch that forms no gradients.
        grad_norm_weight_ptr: [programs, D] of zeros, or None.
        coefficients_ptr: [3, N, tokens] for a, b and c of `attn_res_pull`, or None.
        NEEDS_GRAD: bit i says that source i of this launch needs a gradient.
        MIX_FROM: `"zero"` starts m in this launch, `"carry"` goes on with it, `"done"` takes g and delta as they are.
        MIX_TO: `"carry"` leaves m for the next launch and forms no gradients, `"grads"` forms those of this launch.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    N: tl.constexpr = len(source_ptrs)
    # Wide sources fill the registers that the next one would wait in.
    LOAD_AHEAD: tl.constexpr = source_ptrs[0].dtype.element_ty.primitive_bitwidth <= 16
    program = tl.program_id(0)
    if MIX_TO == "grads":
        grad_weight = zero_row(D, BLOCK_T, BLOCK_D, dtype)
    for tile in range(program, tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        stats = stats_ptr + tokens * (3 + 2 * num_sources)
        logits = stats + 3 + first_source
        rstds = logits + num_sources
        top = tl.load(stats, mask=in_range, other=0.0)
        total = tl.load(stats + 1, mask=in_range, other=1.0)
        if MIX_FROM == "done":
            grad = load_row(carry_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
            delta = tl.load(delta_ptr + tokens, mask=in_range, other=0.0)
        else:
            if MIX_FROM == "zero":
                mix = zero_row(D, BLOCK_T, BLOCK_D, dtype)
            else:
                mix = load_row(carry_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
            for i in tl.static_range(N):
                value = load_row(source_ptrs[i], tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                logit = tl.load(logits + i, mask=in_range, other=0.0)
                mix = settle(add_scaled(mix, value, tl.exp(logit - top) / total))
                # Otherwise the compiler loads all sources at once, and runs out of registers.
                if i % 4 == 3 or i + 1 == N:
                    tl.debug_barrier()
            if MIX_TO == "carry":
                store_row(carry_ptr, mix, tokens, in_range, D, BLOCK_T, BLOCK_D)
            else:
                grad_out = load_row(grad_out_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                if norm_weight_ptr is None:
                    grad = scale_row(grad_out, tl.full([BLOCK_T], 1.0, dtype) * read_scale)
                else:
                    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D, dtype)
                    rho = tl.load(stats + 2, mask=in_range, other=0.0)
                    along = dot_rows(multiply_rows(grad_out, norm_weight), mix) * read_scale
                    to_mix = -rho * rho * rho * along * read_scale * read_scale * (1.0 / D)
                    # Loaded again, from cache: the exchange between threads is no place to keep two more rows.
                    grad_out = load_row(grad_out_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                    grad_out = settle(scale_row(grad_out, rho * read_scale))
                    add_token_sum(grad_norm_weight_ptr + program * D, multiply_rows(grad_out, mix), D, BLOCK_D)
                    norm_weight = load_vector(norm_weight_ptr, D, BLOCK_D, dtype)
                    grad = add_scaled(multiply_rows(grad_out, norm_weight), mix, to_mix)
                grad = settle(grad)
                delta = dot_rows(grad, mix)
                if carry_ptr is not None:
                    store_row(carry_ptr, grad, tokens, in_range, D, BLOCK_T, BLOCK_D)
                    tl.store(delta_ptr + tokens, delta, mask=in_range)
        if MIX_TO == "grads":
            tokens = renew(tokens)
            following = load_row(source_ptrs[0], tokens, in_range, D, BLOCK_T, BLOCK_D)
            for i in tl.static_range(N):
                if i > 0 and not LOAD_AHEAD:
                    following = load_row(source_ptrs[i], tokens, in_range, D, BLOCK_T, BLOCK_D)
                value = convert_row(following, dtype)
                if i + 1 < N and LOAD_AHEAD:
                    following = load_row(source_ptrs[i + 1], tokens, in_range, D, BLOCK_T, BLOCK_D)
                logit = tl.load(logits + i, mask=in_range, other=0.0)
                rstd = tl.load(rstds + i, mask=in_range, other=0.0)
                share = tl.exp(logit - top) / total
                to_weight = share * (dot_rows(grad, value) - delta) * rstd
                grad_weight = settle(add_scaled(grad_weight, value, to_weight))
                if coefficients_ptr is not None:
                    plane = tl.cast(num_sources, tl.int64) * num_tokens
                    of_source = coefficients_ptr + tl.cast(first_source + i, tl.int64) * num_tokens + tokens
                    tl.store(of_source, share * read_scale, mask=in_range)
                    tl.store(of_source + plane, to_weight, mask=in_range)
                    tl.store(of_source + 2 * plane, -to_weight * logit * rstd * (1.0 / D), mask=in_range)
                if (NEEDS_GRAD >> i) & 1:
                    to_value = -to_weight * logit * rstd * (1.0 / D)
                    for k in tl.static_range(len(value)):
                        grad_value = grad[k] * share[:, None] + value[k] * to_value[:, None]
                        # From the first-level cache: kept over the whole loop, w would cost the registers of a row.
                        grad_value += load_vector_chunk(weight_ptr, k, D, BLOCK_D, dtype) * to_weight[:, None]
                        if i + 1 == N and grad_partial_ptr is not None:
                            beyond = load_chunk(grad_partial_ptr, tokens, in_range, k, D, BLOCK_T, BLOCK_D)
                            grad_value += beyond.to(dtype)
                        store_chunk(grad_ptrs[i], grad_value, tokens, in_range, k, D, BLOCK_T, BLOCK_D)
    if MIX_TO == "grads":
        store_token_sum(grad_weight_ptr + program * D, grad_weight, D, BLOCK_D)
