"""Attention over the sequence with its log-sum-exp, forward and backward, by torch's fused kernels.

The log-sum-exp of the kernels is not differentiable. Their backward computes `p_j = exp(s_j - lse)` and
`ds_j = p_j (g . v_j - g . out)` from its arguments `out` and `lse`: called with those of a softmax over additional
keys, it returns the exact gradients of the sequence's keys. `moda_attention_ops` relies on this.

|kernel            |device|inputs                                                       |
|------------------|------|-------------------------------------------------------------|
|`FlashCPU`        |CPU   |all, except a sliding window                                 |
|`FlashCUDA`       |GPU   |bfloat16 and float16 without mask, causal or sliding window  |
|`EfficientCUDA`   |GPU   |masks, float32                                               |
|`Ring`            |all   |causal attention in `context_parallel`, by one of the others |
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .context_parallel import context_parallel_group, ring_backward, ring_forward

aten = torch.ops.aten


class SequenceInputs(NamedTuple):
    """The inputs and options of attention over the sequence.

    Attributes:
        query: queries, [B, Hq, T, d].
        key: keys, [B, Hk, S, d].
        value: values, [B, Hk, S, dv].
        mask: mask, [B or 1, Hq or 1, T, S], bool (True: attend) or additive, or `None`.
        causal: causal mask; with T != S only for kernels with `aligns_last_query`.
        scale: factor on q . k.
        window: size of the sliding window in tokens, including the query's own, or `None`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    window: int | None


class SequenceKernel(ABC):
    """Base class of the kernels, with static methods only."""

    #: Whether a causal mask with more keys than queries is aligned so that the last query attends to all keys, as in
    #: flash attention. A kernel with this alignment supports windows; one without it supports masks.
    aligns_last_query = False

    @staticmethod
    @abstractmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        """Return whether the kernel supports the inputs; of `query`, only device, dtype and shape matter."""

    @staticmethod
    @abstractmethod
    def forward(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp; keys and values must have the same head dimension."""

    @staticmethod
    @abstractmethod
    def backward(grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""


class FlashCPU(SequenceKernel):
    """`_scaled_dot_product_flash_attention_for_cpu`: masks, grouped heads, all floating dtypes."""

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        return query.device.type == "cpu" and window is None

    @staticmethod
    def forward(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
        query, key, value, mask, causal, scale, _ = inputs
        bias = _additive(mask, query)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        if bias is not None:
            # For a token that attends to no key, the kernel returns lse = 0 instead of -inf.
            lse = lse.masked_fill(bias.amax(-1).isneginf(), -torch.inf)
        return out, lse

    @staticmethod
    def backward(grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mask, causal, scale, _ = inputs
        grad_query, grad_key, grad_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=_additive(mask, query), scale=scale
        )
        return grad_query, grad_key, grad_value


class FlashCUDA(SequenceKernel):
    """`_flash_attention_forward`: FA2, or FA3 after `activate_flash_attention_impl("FA3")`."""

    aligns_last_query = True

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        return query.device.type == "cuda" and mask is None and half and query.shape[-1] in range(8, 257, 8)

    @staticmethod
    def forward(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
        query, key, value, _, causal, scale, window = inputs
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
    def backward(grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, causal, scale, window = inputs
        # Without dropout, the state of the random generator is not used.
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


class EfficientCUDA(SequenceKernel):
    """`_scaled_dot_product_efficient_attention`: masks and float32; keys and values are repeated for grouped heads."""

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        return query.device.type == "cuda" and window is None and query.dtype != torch.float64

    @staticmethod
    def forward(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
        query, key, value, mask, causal, scale, _ = inputs
        bias = _aligned_bias(_additive(mask, query), query, key)
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, _repeated(key, query), _repeated(value, query), bias, True, 0.0, causal, scale=scale
        )
        lse = lse[:, :, : query.shape[2]]  # padded to a multiple of 32
        if bias is not None:
            lse = lse.masked_fill(bias.amax(-1).isneginf(), -torch.inf)
        return out, lse

    @staticmethod
    def backward(grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mask, causal, scale, _ = inputs
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


class Ring(SequenceKernel):
    """Ring attention over the tokens of several processes, each step by one of the kernels above."""

    @staticmethod
    def supports(query: Tensor, mask: Tensor | None, window: int | None) -> bool:
        return mask is None and window is None and context_parallel_group() is not None

    @staticmethod
    def _step(query: Tensor) -> type[SequenceKernel]:
        kernel = next((KERNELS[name] for name in _STEPS if KERNELS[name].supports(query, None, None)), None)
        if kernel is None:
            raise ValueError(f"context parallelism: no kernel supports {query.dtype} on {query.device.type!r}.")
        return kernel

    @staticmethod
    def forward(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
        kernel = Ring._step(inputs.query)

        def step(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
            return kernel.forward(SequenceInputs(query, key, value, None, is_causal, inputs.scale, None))

        return ring_forward(step, inputs.query, inputs.key, inputs.value, inputs.causal)

    @staticmethod
    def backward(grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel = Ring._step(inputs.query)

        def step(
            *,
            grad_out: Tensor,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            out: Tensor,
            logsumexp: Tensor,
            is_causal: bool,
        ) -> tuple[Tensor, Tensor, Tensor]:
            part = SequenceInputs(query, key, value, None, is_causal, inputs.scale, None)
            return kernel.backward(grad_out, part, out, logsumexp)

        return ring_backward(step, grad_out, inputs.query, inputs.key, inputs.value, out, lse, inputs.causal)


#: Kernels by name, in order of preference.
KERNELS: dict[str, type[SequenceKernel]] = {
    "ring": Ring,
    "flash_cpu": FlashCPU,
    "flash_cuda": FlashCUDA,
    "efficient_cuda": EfficientCUDA,
}

# Kernels for one step of the ring.
_STEPS = ("flash_cpu", "flash_cuda", "efficient_cuda")


def find_kernel(query: Tensor, mask: Tensor | None, window: int | None) -> str | None:
    """Return the name of a kernel that supports the inputs, or `None` if only the reference does.

    Args:
        query: queries, [B, Hq, T, d]; only device, dtype and shape matter.
        mask: as in `SequenceInputs`.
        window: as in `SequenceInputs`.
    """
    return next((name for name, kernel in KERNELS.items() if kernel.supports(query, mask, window)), None)


def aligns_last_query(kernel: str) -> bool:
    """Return `aligns_last_query` of a kernel."""
    return KERNELS[kernel].aligns_last_query


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return a causal mask, bool [1, 1, T, S], aligned so that the last query attends to all keys."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return seen.tril(num_keys - num_queries)[None, None]


def sequence_forward(inputs: SequenceInputs, kernel: str) -> tuple[Tensor, Tensor]:
    """Compute attention over the sequence, without autograd.

    Args:
        inputs: queries, keys, values and options.
        kernel: name of the kernel, from `find_kernel`.

    Returns:
        The output [B, Hq, T, dv], and the natural log-sum-exp [B, Hq, T] in float32 (float64 for float64), -inf for a
        token that attends to nothing.
    """
    if kernel != "ring" and context_parallel_group() is not None:
        raise RuntimeError(
            f"kernel {kernel!r} attends to the tokens of one process, but `context_parallel` is active: choose the "
            "kernel within it, without torch.compile, for causal attention without a mask or window."
        )
    value_dim = inputs.value.shape[-1]
    out, lse = KERNELS[kernel].forward(_with_one_head_dim(inputs))
    return out[..., :value_dim], lse


def sequence_backward(
    grad_out: Tensor, inputs: SequenceInputs, out: Tensor, lse: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the kernel's backward with a given output and log-sum-exp, which may be those of a softmax over more keys.

    Args:
        grad_out: gradient of the output, [B, Hq, T, dv].
        inputs: as in `sequence_forward`.
        out: output, [B, Hq, T, dv].
        lse: log-sum-exp, [B, Hq, T], finite.
        kernel: as in `sequence_forward`.

    Returns:
        The gradients of query, key and value.
    """
    head_dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    inputs = _with_one_head_dim(inputs)
    missing = inputs.value.shape[-1] - value_dim
    if missing:
        grad_out, out = pad(grad_out, (0, missing)), pad(out, (0, missing))
    grad_query, grad_key, grad_value = KERNELS[kernel].backward(grad_out, inputs, out, lse)
    return grad_query[..., :head_dim], grad_key[..., :head_dim], grad_value[..., :value_dim]


def _with_one_head_dim(inputs: SequenceInputs) -> SequenceInputs:
    """Pad keys or values with zeros to the same head dimension, which the kernels need."""
    head_dim, value_dim = inputs.query.shape[-1], inputs.value.shape[-1]
    if head_dim < value_dim:
        query, key = (pad(x, (0, value_dim - head_dim)) for x in (inputs.query, inputs.key))
        return inputs._replace(query=query, key=key)
    if value_dim < head_dim:
        return inputs._replace(value=pad(inputs.value, (0, head_dim - value_dim)))
    return inputs


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype == query.dtype:
        return mask
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)


def _aligned_bias(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the bias in the layout that the kernel needs: full shape, and strides that are multiples of 16."""
    if bias is None:
        return None
    num_keys = key.shape[2]
    if any(stride % 16 for stride in bias.stride()[:-1]):
        bias = pad(bias, (0, -num_keys % 16))[..., :num_keys]
    return bias.expand(*query.shape[:3], num_keys)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)
