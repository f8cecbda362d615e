"""Attention over the sequence with its log-sum-exp, by torch's own fused kernels, forward and backward.

The kernels give no gradient for the log-sum-exp. Their backward computes `p_j = exp(s_j - lse)` and
`ds_j = p_j (g . v_j - g . out)` from the `out` and `lse` it is handed: called with those of a softmax over more keys
than it knows, it returns the exact gradients of the keys it does know. `moda_attention_ops` rests on that.

|kernel            |device|for                                                          |
|------------------|------|-------------------------------------------------------------|
|`FlashCPU`        |CPU   |everything                                                   |
|`FlashCUDA`       |GPU   |bfloat16 and float16 without mask, causal or sliding window  |
|`EfficientCUDA`   |GPU   |masks, float32                                               |
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten


class FlashCPU:
    """`_scaled_dot_product_flash_attention_for_cpu`: masks, grouped heads, all floating dtypes."""

    aligns_last_query = False

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        return query.device.type == "cpu" and window is None

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        bias = _additive(mask, query)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        if bias is not None:
            # Of a row that sees no key, the kernel says lse = 0, as if it saw one.
            lse = lse.masked_fill(bias.amax(-1).isneginf(), -torch.inf)
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=_additive(mask, query), scale=scale
        )


class FlashCUDA:
    """`_flash_attention_forward`, which FA2 serves and, after `activate_flash_attention_impl("FA3")`, FA3."""

    #: Where there are more keys than queries, a causal mask ends at the last key, not at the first ones.
    aligns_last_query = True

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        return query.device.type == "cuda" and mask is None and half and query.shape[-1] in range(8, 257, 8)

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (query, key, value)),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the state of the random generator is not read.
        seed = torch.empty(2, dtype=torch.uint64, device=query.device)
        gradients = aten._flash_attention_backward(
            *(x.transpose(1, 2) for x in (grad_out, query, key, value, out)),
            lse.contiguous(),
            None,
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            causal,
            seed,
            torch.empty(0, dtype=torch.uint64, device=query.device),
            scale=scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in gradients)
        return grad_query, grad_key, grad_value


class EfficientCUDA:
    """`_scaled_dot_product_efficient_attention`: masks and float32; keys and values are repeated for grouped heads."""

    aligns_last_query = False

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        return query.device.type == "cuda" and window is None and query.dtype != torch.float64

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        bias = _aligned_bias(_additive(mask, query), query, key)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, _repeated(key, query), _repeated(value, query), bias, True, 0.0, causal, scale=scale
        )
        lse = lse[:, :, : query.shape[2]]  # the kernel pads to a multiple of 32
        if bias is not None:
            lse = lse.masked_fill(bias.amax(-1).isneginf(), -torch.inf)
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = _aligned_bias(_additive(mask, query), query, key)
        num_tokens = query.shape[2]
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        grad_query, grad_key, grad_value, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            query,
            _repeated(key, query),
            _repeated(value, query),
            bias,
            out,
            pad(lse, (0, -num_tokens % 32)).contiguous() if num_tokens % 32 else lse.contiguous(),
            state,
            state,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        num_kv_heads = key.shape[1]
        return grad_query, *(x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in (grad_key, grad_value))


KERNELS = (FlashCPU, FlashCUDA, EfficientCUDA)


def find_kernel(query: Tensor, mask: Tensor | None, window: int | None):
    """The kernel that runs these inputs, or `None`: attention then takes the reference.

    Args:
        query: [B, Hq, T, d]; only device, dtype and shape are looked at.
        mask: as in `sequence_forward`.
        window: tokens that a sliding window sees, the own one included, or `None`.
    """
    return next((kernel for kernel in KERNELS if kernel.supports(query, mask, window)), None)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Bool [1, 1, T, S]: the last query sees the last key."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return seen.tril(num_keys - num_queries)[None, None]


def sequence_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention over the sequence, not differentiable.

    Args:
        query: [B, Hq, T, d].
        key: [B, Hk, S, d].
        value: [B, Hk, S, dv].
        mask: [B or 1, Hq or 1, T, S], bool (True is seen) or additive, or `None`.
        causal: as many queries as keys, or the last query meets the last key with `kernel.aligns_last_query`.
        scale: factor on q . k.
        window: tokens that a sliding window sees, or `None`.

    Returns:
        `out` [B, Hq, T, dv] and the natural log-sum-exp [B, Hq, T] (-inf where a token sees nothing), float32, or
        float64 for float64.
    """
    kernel = find_kernel(query, mask, window)
    query, key, value, value_dim = _one_head_dim(query, key, value)
    out, lse = kernel.forward(query, key, value, mask, causal, scale, window)
    return out[..., :value_dim], lse


def sequence_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's own backward, with whatever `out` and `lse` it is to believe in.

    Args:
        grad_out: [B, Hq, T, dv].
        query, key, value, mask, causal, scale, window: as in `sequence_forward`.
        out: [B, Hq, T, dv].
        lse: [B, Hq, T], finite.

    Returns:
        Gradients of query, key and value.
    """
    kernel = find_kernel(query, mask, window)
    head_dim = query.shape[-1]
    query, key, value, value_dim = _one_head_dim(query, key, value)
    missing = value.shape[-1] - value_dim
    if missing:
        grad_out, out = pad(grad_out, (0, missing)), pad(out, (0, missing))
    grad_query, grad_key, grad_value = kernel.backward(
        grad_out, query, key, value, mask, out, lse, causal, scale, window
    )
    return grad_query[..., :head_dim], grad_key[..., :head_dim], grad_value[..., :value_dim]


def _one_head_dim(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Zeros bring keys and values to one size, which the kernels need; the last result is the values' own size."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if head_dim < value_dim:
        query, key = (pad(x, (0, value_dim - head_dim)) for x in (query, key))
    elif value_dim < head_dim:
        value = pad(value, (0, head_dim - value_dim))
    return query, key, value, value_dim


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype == query.dtype:
        return mask
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The kernel wants the full shape, and rows that start at multiples of 16 bytes."""
    if bias is None:
        return None
    num_keys = key.shape[2]
    if any(stride % 16 for stride in bias.stride()[:-1]):
        bias = pad(bias, (0, -num_keys % 16))[..., :num_keys]
    return bias.expand(*query.shape[:3], num_keys)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)
