"""Let decoder layers take and return tensors, for tools that run layers one by one.

GPTQ, AutoRound, AWQ and others capture the input of the first decoder layer and then pass the output of each layer to
the next one themselves. They expect tensors, but our layers return a `DepthState`:

    with layers_that_pass_tensors(model):
        quantizer.quantize_model(model, tokenizer)

Within the context, every layer but the last returns one tensor [B, T, C], the concatenation of finished sources, the
open block, slots and, with a value residual, the values of the first attention layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..attn_res_reads import DEPTH_READS, DepthReads, read_weights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_layer import DepthAttnDecoderLayer
from ..depth_options import DepthConnectionType
from ..depth_state import DepthState
from ..host_attention import depth_kv_shape
from ..value_residual import value_layers


@contextmanager
def layers_that_pass_tensors(model: nn.Module) -> Iterator[None]:
    """Let the decoder layers of a model take and return tensors within the context; its results do not change.

    The tensors grow with the depth of the layer: [B, T, C] with C = (finished sources + 1) D, where 1 is the open
    block, plus Hk (d + dv) for every slot of MoDA, with Hk key-value heads and d and dv the dimensions of keys and
    values, plus Hk dv with a value residual.

    Args:
        model: a model with depth attention.

    Raises:
        ValueError: if the model has no layers with depth attention.
    """
    layers = [module for module in model.modules() if isinstance(module, DepthAttnDecoderLayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no layers with depth attention.")
    # As a child of its parent, which is the active copy if PEFT trains it.
    parent = next((module for module in model.modules() if DEPTH_READS in module._modules), None)
    reads = None if parent is None else cast(DepthReads, parent.get_submodule(DEPTH_READS))
    unpack = _Unpack(cast(DepthAttnConfig, model.config), reads)
    handles = [layer.register_forward_pre_hook(unpack, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(_pack) for layer in layers if layer.out_depth is None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pack(layer: nn.Module, args: tuple, output: DepthState) -> Tensor:
    """Forward hook: pack the `DepthState` that a layer returns into a tensor [B, T, C]."""
    state = output.settled()
    slots = zip(state.depth_keys, state.depth_values, strict=True)
    flat = [x.transpose(1, 2).flatten(2) for slot in slots for x in slot]
    first = [] if state.first_value is None else [state.first_value]
    return torch.cat([*state.sources, state.partial, *flat, *first], -1)


class _Unpack:
    """Forward pre-hook: unpack a tensor [B, T, C] to a `DepthState`; a `DepthState` is passed on unchanged.

    The weights of AttnRes reads are computed anew for every layer: a tool passes on those that it captured at the
    first layer, which may be on another device, older than a change of the parameters, or without a graph.

    Args:
        config: the model's config.
        reads: the module with the weights of AttnRes reads, if the model has one.
    """

    def __init__(self, config: DepthAttnConfig, reads: DepthReads | None):
        self.config = config
        self.reads = reads
        self.slot_sizes: list[int] = []
        self.value_layers = value_layers(config)
        if config.depth_kv is not None or self.value_layers:
            shape = depth_kv_shape(config.host_config)
            self.first_size = shape.num_kv_heads * shape.value_dim
        if config.depth_kv is not None:
            self.num_kv_heads = shape.num_kv_heads
            self.slot_sizes = [shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim]

    def __call__(self, layer: DepthAttnDecoderLayer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        state = self.unpacked(layer, args[0] if args else kwargs["hidden_states"])
        if self.reads is not None:
            newest = state.partial if isinstance(state, DepthState) else state
            weights = read_weights(self.reads, self.config.attn_res_schedule).to(newest.device)
            kwargs = {**kwargs, DEPTH_READS: weights}
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    def unpacked(self, layer: DepthAttnDecoderLayer, packed: Tensor | DepthState) -> Tensor | DepthState:
        if layer.is_first or isinstance(packed, DepthState):
            return packed
        is_residual = self.config.connection == DepthConnectionType.RESIDUAL
        num_sources = 1 if is_residual else self.config.num_sources(2 * layer.layer_idx)
        hidden_size = self.config.hidden_size
        has_first = any(index < layer.layer_idx for index in self.value_layers)
        first_sizes = [self.first_size] if has_first else []
        rest = packed.shape[-1] - num_sources * hidden_size - sum(first_sizes)
        num_slots = rest // sum(self.slot_sizes) if self.slot_sizes else 0
        sizes = [hidden_size] * num_sources + self.slot_sizes * num_slots + first_sizes
        if sum(sizes) != packed.shape[-1]:
            raise ValueError(
                f"hidden_states: {tuple(packed.shape)} is not the shape of the output of layer {layer.layer_idx - 1}."
            )
        parts = packed.split(sizes, -1)
        of_slots = parts[num_sources : num_sources + len(self.slot_sizes) * num_slots]
        slots = [part.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for part in of_slots]
        return DepthState(
            sources=parts[: num_sources - 1],
            partial=parts[num_sources - 1],
            depth_keys=tuple(slots[::2]),
            depth_values=tuple(slots[1::2]),
            first_value=parts[-1] if has_first else None,
        )
