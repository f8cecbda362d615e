"""MoDA as an attention function of transformers, for the unchanged attention modules of the host.

Attention modules look up their attention function by `self.config._attn_implementation`. With MoDA, their config is
replaced by a view in which this is `IMPLEMENTATION`, the function registered here. The rest of the model sees the
user's implementation, which is used for masks and for attention over the sequence:

    self_attn(x, ..., depth_exchange=exchange)
        q, k, v  --->  moda_attention_forward  --->  out
                        |  ^         |
          own k, v <----+  |         +-- sdpa, eager, flex_attention or flash_attention_*, by the user's choice
                     depth slots
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.flash_attention import get_target_dtype
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .context_parallel import refuse_split_sequence
from .moda_attention_ops import ModaInputs, gated, moda_attention, moda_attention_reference
from .moda_depth_ops import depth_weights, moda_depth_merge
from .paged_attention import is_paged, paged_keys_and_values
from .sequence_attention import aligns_last_query, find_kernel

logger = logging.get_logger(__name__)

#: Key in `ALL_ATTENTION_FUNCTIONS`. It contains the module name, since remote code has its own copy of this file.
IMPLEMENTATION = f"depthattn:{__name__}"


class AttentionConfigView:
    """A view of the host's config, with the attention implementation of MoDA, for the host's attention modules."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, host_config: PreTrainedConfig):
        self.host_config = host_config

    def __getattr__(self, name: str):
        if name == "host_config":  # not set yet during unpickling
            raise AttributeError(name)
        return getattr(self.host_config, name)


def use_moda_attention(attention: nn.Module, host_config: PreTrainedConfig) -> None:
    """Make an attention module call `moda_attention_forward`; its calls then need a `DepthExchange`.

    Args:
        attention: the attention module of a decoder layer.
        host_config: the host's config.
    """
    # To torch's types, every attribute is a tensor or a module.
    attention.config = AttentionConfigView(host_config)  # type: ignore[assignment]


class DepthExchange:
    """The slots that one call of an attention module reads, and the keys, values and weights that it returns.

    Attributes:
        keys: keys of L slots, oldest first, each [B, Hk, T, d].
        values: values of the slots, each [B, Hk, T, dv].
        gate: the layer's gate, [Hq], or `None` without a gate.
        to_depth_query: function from the query of the sequence to the query for the slots; `None` if they are equal.
        first_key: index of this call's first token in the keys, which begin with those from the cache.
        stock_attention: the host's eager attention function.
        own: keys and values of this call's tokens, [B, Hk, T, d], set by the attention function.
        weights: weights of the slots, [B, Hq, T, L], set by the attention function if `return_weights` is true.
    """

    def __init__(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        *,
        gate: Tensor | None,
        to_depth_query: Callable[[Tensor], Tensor] | None,
        first_key: int | Tensor,
        stock_attention: Callable,
        return_weights: bool,
    ):
        self.keys = keys
        self.values = values
        self.gate = gate
        self.to_depth_query = to_depth_query
        self.first_key = first_key
        self.stock_attention = stock_attention
        self.return_weights = return_weights
        self.own: tuple[Tensor, Tensor] | None = None
        self.weights: Tensor | None = None


class AttentionCall(NamedTuple):
    """One call of an attention function.

    Attributes:
        module: the host's attention module.
        query: queries, [B, Hq, T, d].
        key: keys including the cache, [B, Hk, S, d].
        value: values including the cache, [B, Hk, S, dv].
        mask: mask in the format of the user's attention implementation.
        exchange: the slots.
        dropout: dropout probability of attention weights.
        scaling: factor on q . k.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    exchange: DepthExchange
    dropout: float
    scaling: float

    def stock(self, attention: Callable[..., Any], **options: Any) -> tuple[Tensor, Tensor | None]:
        """Call a stock attention function, which does not read the slots."""
        states = self.query, self.key, self.value, self.mask
        return attention(self.module, *states, dropout=self.dropout, scaling=self.scaling, **options)

    def depth_query(self) -> Tensor | None:
        """Return the query for the slots, or `None` if it is that of the sequence."""
        to_depth_query = self.exchange.to_depth_query
        return None if to_depth_query is None else to_depth_query(self.query)

    def inputs(self, **options: Any) -> ModaInputs:
        """Return the inputs of the ops; options are further fields of `ModaInputs`."""
        slots = self.exchange.keys, self.exchange.values
        options |= {"depth_query": self.depth_query(), "mask": self.mask, "gate": self.exchange.gate}
        return ModaInputs(self.query, self.key, self.value, *slots, scale=self.scaling, **options)

    def is_causal(self, is_causal: bool | None) -> bool:
        """Return whether attention is causal: as said in the call, or by the module."""
        return getattr(self.module, "is_causal", True) if is_causal is None else is_causal

    def autocast(self) -> AttentionCall:
        """Return the call with states that autocast would cast for stock attention, since it does not for our ops."""
        device_type = self.query.device.type
        enabled = torch.is_autocast_enabled(device_type)
        return self.cast_to(torch.get_autocast_dtype(device_type)) if enabled else self

    def cast_to(self, dtype: torch.dtype) -> AttentionCall:
        """Return the call with states of another dtype; float64 stays."""
        states = (self.query, self.key, self.value)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in states)
        return self._replace(query=query, key=key, value=value)

    def find_kernel(self) -> str | None:
        """Return the kernel for the sequence, without a window, or `None` if the reference has to be used."""
        # Fused kernels that return a log-sum-exp have no dropout; an exported program cannot contain our ops.
        cannot = bool(self.dropout) or torch.compiler.is_exporting()
        return None if cannot else find_kernel(self.query, self.mask, None)


def moda_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    depth_exchange: DepthExchange | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention over the sequence and the slots, as an attention function of transformers.

    Args:
        module: the host's attention module.
        query: queries, [B, Hq, T, d].
        key: keys including the cache, [B, Hk, S, d].
        value: values including the cache, [B, Hk, S, dv].
        attention_mask: mask in the format of the user's attention implementation.
        dropout: dropout probability of attention weights.
        scaling: factor on q . k; 1 / sqrt(d) by default.
        depth_exchange: the slots, passed by the decoder layer.
        **kwargs: `softcap`, `s_aux`, `sliding_window`, `is_causal` and other arguments of hosts.

    Returns:
        The output [B, T, Hq, dv], and the weights of the sequence [B, Hq, T, S] or `None`.

    Raises:
        ValueError: if there are no slots, or the user's attention implementation does not support MoDA.
    """
    if depth_exchange is None:
        raise ValueError(f"attn_implementation: {IMPLEMENTATION!r} is for internal use; choose another one.")
    num_tokens = query.shape[2]
    if is_paged(kwargs):
        key, value, own = paged_keys_and_values(key, value, num_tokens, cast(int, module.layer_idx), kwargs)
    else:
        own = (_own(key, num_tokens, depth_exchange), _own(value, num_tokens, depth_exchange))
    depth_exchange.own = own
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    host_config = cast(AttentionConfigView, module.config).host_config
    implementation = host_config._attn_implementation.removeprefix("paged|")
    if implementation not in _SEQUENCE_PARTS:
        raise ValueError(
            f"attn_implementation: {implementation!r} does not return the log-sum-exp that MoDA needs; choose one of "
            f"{', '.join(_SEQUENCE_PARTS)}."
        )
    run = _SEQUENCE_PARTS[implementation]
    # Eager attention is not registered.
    stock = ALL_ATTENTION_FUNCTIONS.get(implementation)
    refuse_split_sequence(implementation, stock, query, key, attention_mask, dropout)
    call = AttentionCall(module, query, key, value, attention_mask, depth_exchange, dropout, scaling)
    return run(call, **kwargs)


def _own(states: Tensor, num_tokens: int, exchange: DepthExchange) -> Tensor:
    if states.shape[2] == num_tokens:
        return states
    if isinstance(exchange.first_key, int):
        return states.narrow(2, exchange.first_key, num_tokens)
    positions = exchange.first_key + torch.arange(num_tokens, device=states.device)
    return states.index_select(2, positions)


def _eager(
    call: AttentionCall, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if not call.exchange.keys:
        return call.stock(call.exchange.stock_attention, softcap=softcap, s_aux=s_aux, **kwargs)
    return _reference(call, call.inputs(), softcap=softcap, sinks=s_aux)


def _reference(call: AttentionCall, inputs: ModaInputs, **options: Any) -> tuple[Tensor, Tensor]:
    out, weights, slot_weights = moda_attention_reference(inputs, dropout=call.dropout, **options)
    call.exchange.weights = slot_weights.detach() if call.exchange.return_weights else None
    return out, weights


def _sdpa(call: AttentionCall, is_causal: bool | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    if not call.exchange.keys:
        return call.stock(ALL_ATTENTION_FUNCTIONS["sdpa"], is_causal=is_causal, **kwargs)
    # Soft-capping is not checked here: the stock function, which layer 0 calls, raises, or ignores it (old versions).
    _refuse(kwargs, "sdpa", "s_aux", "position_bias")
    num_tokens = call.query.shape[2]
    causal = num_tokens > 1 and call.mask is None and call.is_causal(is_causal)
    if causal and call.key.shape[2] > num_tokens:
        # More keys than queries and no mask: a prefill into an empty static cache, whose other keys are not used.
        call = call._replace(key=call.key[:, :, :num_tokens], value=call.value[:, :, :num_tokens])
    call = call.autocast()
    return _fused(call, call.find_kernel(), causal=causal)


def _flash(
    call: AttentionCall,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    _refuse(kwargs, "flash_attention", "softcap", "s_aux", "cu_seq_lens_q")
    target_dtype = get_target_dtype(call.query, call.module)
    if target_dtype is not None:
        call = call.cast_to(target_dtype)
    causal = call.is_causal(is_causal)
    num_tokens, num_keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    window = sliding_window if sliding_window is not None and num_keys > sliding_window else None
    padding, documents = call.mask, _documents(position_ids, num_tokens, num_keys)
    seen = None
    if padding is not None or documents is not None:
        seen = _dense_mask(padding, documents, num_tokens, num_keys, causal, window, device)
    call = call._replace(mask=seen).autocast()
    # Flash kernels support windows, and the other kernels support the mask that contains the window.
    kernel = call.find_kernel()
    if seen is None and kernel is not None and aligns_last_query(kernel):
        return _fused(call, kernel, causal=causal, window=window)
    logger.warning_once(
        "MoDA does not use flash attention for padded or packed batches, dropout and float32, because torch's flash "
        "kernel does not support them; other kernels are used instead."
    )
    if seen is None:
        call = call._replace(mask=_dense_mask(None, None, num_tokens, num_keys, causal, window, device))
    return _fused(call, kernel, causal=False)


def _documents(position_ids: Tensor | None, num_tokens: int, num_keys: int) -> Tensor | None:
    """Return the document index of every token if position ids show that a row packs several, and `None` otherwise."""
    if position_ids is None or position_ids.shape[0] != 1 or num_tokens != num_keys or num_tokens == 1:
        return None
    starts = position_ids.diff(dim=-1) != 1
    return torch.nn.functional.pad(starts.cumsum(-1), (1, 0)) if bool(starts.any()) else None


def _dense_mask(
    padding: Tensor | None,
    documents: Tensor | None,
    num_tokens: int,
    num_keys: int,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Return the mask that flash attention implies, as bool [B, 1, T, S]; the last query is aligned with the last key.

    Args:
        padding: padding mask [B, S], nonzero for tokens, or `None`.
        documents: document index of every token, [1, T], or `None`.
        num_tokens: T.
        num_keys: S.
        causal: whether to mask later tokens.
        window: size of the sliding window in tokens, or `None`.
        device: device of the mask.
    """
    keys = torch.arange(num_keys, device=device)
    queries = torch.arange(num_keys - num_tokens, num_keys, device=device)[:, None]
    seen = torch.ones(1, 1, num_tokens, num_keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (keys <= queries)
    if window is not None:
        seen = seen & (keys > queries - window)
    if padding is not None:
        seen = seen & padding[:, None, None, -num_keys:].bool()
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen


def _fused(call: AttentionCall, kernel: str | None, *, causal: bool, window: int | None = None) -> tuple[Tensor, None]:
    inputs = call.inputs(causal=causal, window=window)
    if kernel is None:
        return _reference(call, inputs)[0], None
    out, lse = moda_attention(inputs, kernel=kernel)
    _record(call, inputs.depth()[0], lse)
    return out, None


def _flex(
    call: AttentionCall, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    exchange = call.exchange
    if not exchange.keys:
        return call.stock(ALL_ATTENTION_FUNCTIONS["flex_attention"], softcap=softcap, s_aux=s_aux, **kwargs)
    if call.dropout:
        raise ValueError("flex_attention does not support dropout; set the host's attention_dropout to 0.")
    if isinstance(call.mask, Tensor):
        raise ValueError("flex_attention: MoDA needs the block mask of the host; do not pass a dense mask.")
    seq_out, seq_lse = flex_with_lse(call.query, call.key, call.value, call.mask, call.scaling, softcap)
    if s_aux is not None:
        sinks = s_aux.to(seq_lse.dtype).reshape(1, -1, 1)
        lse_with_sinks = torch.logaddexp(seq_lse, sinks)
        seq_out = seq_out * (seq_lse - lse_with_sinks).exp().unsqueeze(-1).to(seq_out.dtype)
        seq_lse = lse_with_sinks
    depth_query = call.depth_query()
    depth_query = call.query if depth_query is None else depth_query
    out, lse = moda_depth_merge(
        depth_query, exchange.keys, exchange.values, seq_out, seq_lse, scale=call.scaling, softcap=softcap
    )
    if exchange.gate is not None:
        out = gated(seq_out.transpose(1, 2), out, exchange.gate[:, None])
    _record(call, depth_query, lse, softcap or 0.0)
    return out.contiguous(), None


def flex_with_lse(
    query: Tensor, key: Tensor, value: Tensor, block_mask, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return output [B, Hq, T, dv] and log-sum-exp [B, Hq, T] of `flex_attention`, both differentiable.

    On a CPU, the log-sum-exp needs uncompiled `flex_attention`, and is not differentiable.

    Args:
        query: [B, Hq, T, d].
        key: keys of the sequence, [B, Hk, S, d].
        value: values of the sequence, [B, Hk, S, dv].
        block_mask: the `BlockMask` of transformers.
        scaling: factor on the logits.
        softcap: bound c of the logits, c tanh(logit / c), or `None`.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    def score_mod(score, batch, head, query_idx, key_idx):
        return softcap * torch.tanh(score / softcap) if softcap else score

    num_groups = query.shape[1] // key.shape[1]
    run = flex_attention
    if query.device.type != "cpu" and not torch.compiler.is_compiling():
        run = WrappedFlexAttention(query.requires_grad)()
    out, aux = run(
        query,
        key.repeat_interleave(num_groups, 1),
        value.repeat_interleave(num_groups, 1),
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scaling,
        return_aux=AuxRequest(lse=True),
    )
    return out, cast(Tensor, aux.lse)


def _record(call: AttentionCall, query: Tensor, lse: Tensor, softcap: float = 0.0) -> None:
    exchange = call.exchange
    if not exchange.return_weights:
        return
    weights = depth_weights(query, exchange.keys, lse, scale=call.scaling, softcap=softcap)
    exchange.weights = weights if exchange.gate is None else weights * exchange.gate.detach()[:, None, None]


def _refuse(kwargs: dict, implementation: str, *names: str) -> None:
    for name in names:
        if kwargs.get(name) is not None:
            advice = "sdpa or eager and pass position_ids" if name == "cu_seq_lens_q" else "eager or flex_attention"
            raise ValueError(
                f"attn_implementation: {implementation!r} does not support {name!r} with MoDA; choose {advice}."
            )


_SEQUENCE_PARTS: dict[str, Callable] = {
    "sdpa": _sdpa,
    "eager": _eager,
    "flex_attention": _flex,
    "flash_attention_2": _flash,
    "flash_attention_3": _flash,
}

ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, moda_attention_forward)
