r"""AttnRes read, backward: gradients of the sources and of the score weight.

Notation of `attn_res_read`, p = softmax(s), g = read_scale * dL/dh, m = sum_i p_i v_i:

    delta = g . m
    ds_i  = p_i (g . v_i - delta)
    dv_i  = p_i g + ds_i r_i w - (ds_i s_i r_i^2 / D) v_i
    dw    = sum over tokens and i of ds_i r_i v_i

Since delta is computed as g . m, rounding errors of g cancel in ds.

Neither h nor the probabilities are saved by the forward: a first loop over the sources computes m from the logits,
without reductions over channels, and a second loop, for which the sources are in cache, computes the gradients. If h
were saved in the dtype of the sources, its rounding error would be in delta and thus in the differences in ds.

A program loops over tokens with a stride. It keeps its part of dw in registers, and stores it as one row at the end.
The rows are summed in a fixed order afterwards, without atomics, so that results are deterministic.

With a prior o of logit lse (`attn_res_read`):

    do = p_0 g,  dlse = p_0 (g . o - delta) = -sum_i ds_i

Phase 2 has kept either o, which is then one more term of m, or h, which replaces m: delta = dL/dh . h. Gradients of
the sources from later uses are added to the results.
"""

from __future__ import annotations

from .row_tiles import (
    add_scaled,
    convert_row,
    dot_rows,
    jit,
    load_chunk,
    load_row,
    load_vector_chunk,
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
    weight_ptr,
    stats_ptr,
    carry_ptr,
    delta_ptr,
    grad_weight_ptr,
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
    prior_ptr=None,
    prior_lse_ptr=None,
    read_ptr=None,
    grad_prior_ptr=None,
    grad_prior_lse_ptr=None,
    passed_ptrs=None,
    HAS_PASSED: tl.constexpr = 0,
):
    """Compute m and the gradients for the sources of this launch; more sources need several launches (`attn_res_ops`).

    Args:
        source_ptrs: tuple of matrices [tokens, D], the sources from `first_source` on.
        grad_ptrs: tuple of outputs [tokens, D], the gradients of the sources; any pointer for one that is not needed.
        grad_out_ptr: dL/dh, [tokens, D]; None in a launch that does not finish m.
        weight_ptr: w [D], in the dtype of sums.
        stats_ptr: the statistics of the forward, [tokens, 2 + 2 N].
        carry_ptr: [tokens, D] in the dtype of sums, the partial sum m, and finally g, between launches; or None.
        delta_ptr: delta between launches, [tokens], or None.
        grad_weight_ptr: output, [programs, D], in the dtype of sums; None in a launch without gradients.
        NEEDS_GRAD: bit i is set if source i of this launch needs a gradient.
        MIX_FROM: `"zero"`: m starts in this launch; `"carry"`: m is continued; `"done"`: g and delta are loaded;
            `"read"`: h is loaded instead of m.
        MIX_TO: `"carry"`: m is stored for the next launch, without gradients; `"grads"`: gradients are computed.
        prior_ptr: o [tokens, D], in the launches that start or finish m, or None.
        prior_lse_ptr: lse [tokens], or None.
        read_ptr: h [tokens, D], or None.
        grad_prior_ptr: output, the gradient of o, [tokens, D], in the launch that finishes m or loads h, or None.
        grad_prior_lse_ptr: output, the gradient of lse, [tokens], or None. Launches with h add to it.
        passed_ptrs: tuple of matrices [tokens, D], the gradients from later uses; any pointer for one that is not
            given.
        HAS_PASSED: bit i is set if source i of this launch has a gradient from later uses.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    N: tl.constexpr = len(source_ptrs)
    # Prefetching the next source would need too many registers with 32-bit sources.
    LOAD_AHEAD: tl.constexpr = source_ptrs[0].dtype.element_ty.primitive_bitwidth <= 16
    program = tl.program_id(0)
    if MIX_TO == "grads":
        grad_weight = zero_row(D, BLOCK_T, BLOCK_D, dtype)
    for tile in range(program, tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = tl.cast(tile, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_range = tokens < num_tokens
        stats = stats_ptr + tokens * (2 + 2 * num_sources)
        logits = stats + 2 + first_source
        rstds = logits + num_sources
        top = tl.load(stats, mask=in_range, other=0.0)
        total = tl.load(stats + 1, mask=in_range, other=1.0)
        if MIX_FROM == "done":
            grad = load_row(carry_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
            delta = tl.load(delta_ptr + tokens, mask=in_range, other=0.0)
        elif MIX_FROM == "read":
            grad_out = load_row(grad_out_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
            delta = dot_rows(grad_out, load_row(read_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype))
            grad = settle(scale_row(grad_out, tl.full([BLOCK_T], 1.0, dtype) * read_scale))
        else:
            if MIX_FROM == "zero" and prior_ptr is not None:
                prior = load_row(prior_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                prior_lse = tl.load(prior_lse_ptr + tokens, mask=in_range, other=0.0)
                mix = settle(scale_row(prior, tl.exp(prior_lse - top) / total))
            elif MIX_FROM == "zero":
                mix = zero_row(D, BLOCK_T, BLOCK_D, dtype)
            else:
                mix = load_row(carry_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D)
            for i in tl.static_range(N):
                value = load_row(source_ptrs[i], tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                logit = tl.load(logits + i, mask=in_range, other=0.0)
                mix = settle(add_scaled(mix, value, tl.exp(logit - top) / total))
                # Otherwise the compiler loads all sources at once and spills registers.
                if i % 4 == 3 or i + 1 == N:
                    tl.debug_barrier()
            if MIX_TO == "carry":
                store_row(carry_ptr, mix, tokens, in_range, D, BLOCK_T, BLOCK_D)
            else:
                grad_out = load_row(grad_out_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                grad = scale_row(grad_out, tl.full([BLOCK_T], 1.0, dtype) * read_scale)
                grad = settle(grad)
                delta = dot_rows(grad, mix)
                if carry_ptr is not None:
                    store_row(carry_ptr, grad, tokens, in_range, D, BLOCK_T, BLOCK_D)
                    tl.store(delta_ptr + tokens, delta, mask=in_range)
        if grad_prior_ptr is not None:
            tokens = renew(tokens)
            prior_lse = tl.load(prior_lse_ptr + tokens, mask=in_range, other=0.0)
            prior_share = tl.exp(prior_lse - top) / total
            store_row(grad_prior_ptr, scale_row(grad, prior_share), tokens, in_range, D, BLOCK_T, BLOCK_D)
            if prior_ptr is not None:
                # Loaded again, from cache, since registers do not hold it over the sources.
                prior = load_row(prior_ptr, tokens, in_range, D, BLOCK_T, BLOCK_D, dtype)
                tl.store(grad_prior_lse_ptr + tokens, prior_share * (dot_rows(grad, prior) - delta), mask=in_range)
        if MIX_TO == "grads":
            tokens = renew(tokens)
            if MIX_FROM == "read":
                to_lse = tl.zeros([BLOCK_T], dtype)
                if grad_prior_ptr is None:
                    to_lse = tl.load(grad_prior_lse_ptr + tokens, mask=in_range, other=0.0)
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
                to_logit = share * (dot_rows(grad, value) - delta)
                if MIX_FROM == "read":
                    to_lse -= to_logit
                to_weight = to_logit * rstd
                grad_weight = settle(add_scaled(grad_weight, value, to_weight))
                if (NEEDS_GRAD >> i) & 1:
                    to_value = -to_weight * logit * rstd * (1.0 / D)
                    for k in tl.static_range(len(value)):
                        grad_value = grad[k] * share[:, None] + value[k] * to_value[:, None]
                        # Loaded from L1 cache each time: kept in registers, w would need those of a whole row.
                        grad_value += load_vector_chunk(weight_ptr, k, D, BLOCK_D, dtype) * to_weight[:, None]
                        if (HAS_PASSED >> i) & 1:
                            grad_value += load_chunk(passed_ptrs[i], tokens, in_range, k, D, BLOCK_T, BLOCK_D).to(
                                dtype
                            )
                        store_chunk(grad_ptrs[i], grad_value, tokens, in_range, k, D, BLOCK_T, BLOCK_D)
            if MIX_FROM == "read":
                tl.store(grad_prior_lse_ptr + tokens, to_lse, mask=in_range)
    if MIX_TO == "grads":
        store_token_sum(grad_weight_ptr + program * D, grad_weight, D, BLOCK_D)
