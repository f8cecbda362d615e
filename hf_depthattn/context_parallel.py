"""MoDA in torch's `context_parallel`, in which every process has a part of the tokens of each sequence.

torch replaces `F.scaled_dot_product_attention` by *ring attention*: keys and values go around the processes, and the
results of attention to each part are merged. MoDA calls kernels itself, so it calls the same ring here:

    own queries, keys, values --> torch's ring, with a kernel per step --> output, log-sum-exp over all tokens
                                    |  keys and values of the others  |
    backward: the ring's own, with the output and log-sum-exp of sequence and slots (see `sequence_attention`)

Slots belong to the query's own token and are not exchanged. torch's functions are private. They are the same in torch
2.9 and 2.13; what cannot be recognised is refused.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Where the ring is in torch 2.13, and in 2.9.
_RING_MODULES = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)
_TOKEN_DIM = 2

#: A kernel for one step of the ring.
Step = Callable[..., tuple[Tensor, ...]]


def context_parallel_group() -> Any | None:
    """Return the process group of the `context_parallel` that is active, or `None` outside of one.

    Raises:
        RuntimeError: if tokens are split between processes in a way that MoDA does not recognise.
    """
    # Compiled code runs the ops, which check this again, at times that tracing does not know.
    if torch.compiler.is_compiling():
        return None
    attention = functional.scaled_dot_product_attention
    if str(getattr(attention, "__module__", "")).startswith("torch.distributed."):
        names = attention.__code__.co_freevars
        cells = (cell.cell_contents for cell in attention.__closure__ or ())
        mesh = dict(zip(names, cells, strict=True)).get("device_mesh")
        if mesh is not None and _ring_functions() is not None:
            return mesh.get_group()
    elif not _dispatches_attention():
        return None
    raise RuntimeError(
        f"context parallelism: MoDA supports `torch.distributed.tensor.experimental.context_parallel` of torch 2.9 to "
        f"2.13, and torch {torch.__version__} splits the tokens in another way; remove the split or use another torch."
    )


def refuse_split_sequence(
    implementation: str, attention: Callable | None, query: Tensor, key: Tensor, mask: Any, dropout: float
) -> None:
    """Raise an error if the tokens of a sequence are split between processes in a way that MoDA does not support.

    Args:
        implementation: attention implementation of the host.
        attention: its function, or `None` if transformers has none of this name.
        query: queries, [B, Hq, T, d].
        key: keys, [B, Hk, S, d].
        mask: mask in the format of the implementation, or `None`.
        dropout: dropout probability of attention weights.

    Raises:
        ValueError: under DeepSpeed's Ulysses, and in `context_parallel` for anything but causal sdpa without a mask,
            a cache and dropout.
    """
    if getattr(attention, "__module__", "").startswith("deepspeed."):
        raise ValueError(
            "sequence parallelism: MoDA does not support sp_size > 1 (DeepSpeed's Ulysses), which exchanges heads for "
            "tokens but not the heads of slots; use context parallelism (cp_size)."
        )
    if context_parallel_group() is None:
        return
    if implementation != "sdpa":
        raise ValueError(
            f"attn_implementation: {implementation!r} does not support MoDA in context parallelism; choose 'sdpa'."
        )
    if mask is not None:
        raise ValueError(
            f"attention_mask: got a mask of shape {tuple(mask.shape)}, but MoDA in context parallelism needs causal "
            "attention without a mask, padding or packing. Prepare the model with accelerate, which removes the "
            "causal mask, and use sequences of one length."
        )
    if dropout:
        raise ValueError(
            f"attention_dropout: {dropout} is not supported by MoDA in context parallelism; it must be 0."
        )
    if key.shape[_TOKEN_DIM] != query.shape[_TOKEN_DIM]:
        raise ValueError(
            f"use_cache: got {key.shape[_TOKEN_DIM]} keys for {query.shape[_TOKEN_DIM]} tokens, but MoDA in context "
            "parallelism does not support a cache; set use_cache=False."
        )


def ring_forward(step: Step, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output [B, Hq, T, d] and log-sum-exp [B, Hq, T] of attention to the tokens of all processes.

    Args:
        step: a kernel, called with query, key, value and `is_causal`, that returns output and log-sum-exp.
        query: queries of this process, [B, Hq, T, d].
        key: keys of this process, [B, Hk, T, d].
        value: values of this process, [B, Hk, T, d].
        causal: whether attention is causal.

    Raises:
        RuntimeError: outside of `context_parallel`.
        ValueError: if attention is not causal, or if this process has a single token, which could not be causal.
    """
    if not causal:
        raise ValueError(
            f"context parallelism: MoDA needs causal attention and at least 2 tokens per process, got causal={causal} "
            f"and {query.shape[_TOKEN_DIM]} tokens."
        )
    forward, _ = _ring()
    out, lse, *_ = forward(_TOKEN_DIM, step, query, key, value, is_causal=causal)
    return out, lse


def ring_backward(
    step: Step,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; keys and values get those of the queries of all processes.

    Args:
        step: a kernel's backward, called with keywords (`grad_out`, `query`, `key`, `value`, `out`, `logsumexp`,
            `is_causal`), that returns the gradients of query, key and value.
        grad_out: gradient of the output, [B, Hq, T, d].
        query: as in `ring_forward`.
        key: as in `ring_forward`.
        value: as in `ring_forward`.
        out: output, [B, Hq, T, d].
        lse: log-sum-exp, [B, Hq, T].
        causal: as in `ring_forward`.

    Raises:
        RuntimeError: outside of `context_parallel`.
    """
    _, backward = _ring()
    gradients = backward(_TOKEN_DIM, step, grad_out, "grad_out", query, key, value, out, lse, causal)
    grad_query, grad_key, grad_value, *_ = gradients
    # The last two are views of one buffer, and outputs of an op must not share memory.
    return grad_query, grad_key.clone(), grad_value.clone()


def _ring() -> tuple[Callable, Callable]:
    """Return the ring's forward and backward for the group of the active context."""
    functions, group = _ring_functions(), context_parallel_group()
    if functions is None or group is None:
        raise RuntimeError("MoDA in context parallelism: run forward and backward within `context_parallel`.")
    forward, backward = functions
    return partial(forward, group), partial(backward, group)


def _ring_functions() -> tuple[Callable, Callable] | None:
    for name in _RING_MODULES:
        # A module that has not been imported has split nothing.
        functions = vars(sys.modules.get(name, object))
        if "_templated_ring_attention_backward" in functions:
            return functions["_templated_ring_attention"], functions["_templated_ring_attention_backward"]
    return None


def _dispatches_attention() -> bool:
    """Return whether torch would send attention over sharded tensors to its ring: `context_parallel` and others."""
    tensors = sys.modules.get("torch.distributed.tensor")
    dispatcher = getattr(getattr(tensors, "DTensor", None), "_op_dispatcher", None)
    handlers = getattr(dispatcher, "_custom_op_handlers", {})
    return torch.ops.aten._scaled_dot_product_flash_attention.default in handlers
