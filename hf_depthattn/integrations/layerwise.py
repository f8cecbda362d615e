"""Let decoder layers take and return tensors, for tools that run layers one by one.

GPTQ, AutoRound, AWQ and others capture the input of the first decoder layer and then pass the output of each layer to
the next one themselves. They expect tensors, but our layers return a `DepthState`:

    with layers_that_pass_tensors(model):
        quantizer.quantize_model(model, tokenizer)

Within the context, every layer but the last returns one tensor [B, T, C], the concatenation of finished sources, the
open block, residual stream or streams, slots and, with a value residual, the values of the first attention layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..attn_res_reads import DEPTH_READS, DepthReads, read_weights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_layer import DepthAttnDecoderLayer
from ..depth_state import DepthState


@contextmanager
def layers_that_pass_tensors(model: nn.Module) -> Iterator[None]:
    """Let the decoder layers of a model take and return tensors within the context; its results do not change.

    The tensors may grow with the depth of the layer: [B, T, C] with C = (finished sources + n) D, where n is the
    number of streams (1 for the open block of AttnRes or a residual stream), plus Hk (d + dv) for every slot of MoDA,
    with Hk key-value heads and d and dv the dimensions of keys and values, plus Hk dv with a value residual.

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
    packing = _Packing(cast(DepthAttnConfig, model.config), reads)
    handles = [layer.register_forward_pre_hook(packing.unpack_input, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(packing.pack_output) for layer in layers if layer.out_depth is None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Shapes(NamedTuple):
    """Shapes of a state's tensors without B and T: sources, `partial`, slots (keys and values in turn), values."""

    sources: list[tuple[int, ...]]
    partial: tuple[int, ...]
    slots: list[tuple[int, ...]]
    first_value: list[tuple[int, ...]]


class _Packing:
    """The hooks that pack a `DepthState` into a tensor [B, T, C] and unpack it again.

    Which tensors a state has depends on the connection, so the shapes are those that each layer returned last.

    The weights of AttnRes reads are computed anew for every layer: a tool passes on those that it captured at the
    first layer, which may be on another device, older than a change of the parameters, or without a graph.

    Args:
        config: the model's config.
        reads: the module with the weights of AttnRes reads, if the model has one.
    """

    def __init__(self, config: DepthAttnConfig, reads: DepthReads | None):
        self.config = config
        self.reads = reads
        self.shapes_after: dict[int, _Shapes] = {}

    def pack_output(self, layer: DepthAttnDecoderLayer, args: tuple, output: DepthState) -> Tensor:
        """Forward hook: pack the state that a layer returns."""
        state = output.settled()
        # Slots have their heads before T.
        slots = [x.transpose(1, 2) for slot in zip(state.depth_keys, state.depth_values, strict=True) for x in slot]
        first = [] if state.first_value is None else [state.first_value]
        tensors = [*state.sources, state.partial, *slots, *first]
        shapes = [tuple(tensor.shape[2:]) for tensor in tensors]
        num_sources = len(state.sources)
        num_states = num_sources + 1 + len(slots)
        self.shapes_after[layer.layer_idx] = _Shapes(
            shapes[:num_sources], shapes[num_sources], shapes[num_sources + 1 : num_states], shapes[num_states:]
        )
        return torch.cat([tensor.flatten(2) for tensor in tensors], -1)

    def unpack_input(self, layer: DepthAttnDecoderLayer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: unpack the tensor that a layer gets; a `DepthState` is passed on unchanged."""
        state = self._unpacked(layer, args[0] if args else kwargs["hidden_states"])
        if self.reads is not None:
            newest = state.partial if isinstance(state, DepthState) else state
            weights = read_weights(self.reads, self.config.attn_res_schedule).to(newest.device)
            kwargs = {**kwargs, DEPTH_READS: weights}
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    def _unpacked(self, layer: DepthAttnDecoderLayer, packed: Tensor | DepthState) -> Tensor | DepthState:
        if layer.is_first or isinstance(packed, DepthState):
            return packed
        shapes = self.shapes_after.get(layer.layer_idx - 1)
        if shapes is None:
            raise ValueError(
                f"hidden_states: layer {layer.layer_idx} got a tensor, but layer {layer.layer_idx - 1} has not run "
                "within `layers_that_pass_tensors`; run the layers in their order."
            )
        all_shapes = [*shapes.sources, shapes.partial, *shapes.slots, *shapes.first_value]
        sizes = [prod(shape) for shape in all_shapes]
        if sum(sizes) != packed.shape[-1]:
            raise ValueError(
                f"hidden_states: {tuple(packed.shape)} is not the shape of the output of layer {layer.layer_idx - 1}, "
                f"whose last dimension is {sum(sizes)}."
            )
        parts = [part.unflatten(-1, shape) for part, shape in zip(packed.split(sizes, -1), all_shapes, strict=True)]
        num_sources = len(shapes.sources)
        slots = [part.transpose(1, 2) for part in parts[num_sources + 1 :][: len(shapes.slots)]]
        return DepthState(
            sources=tuple(parts[:num_sources]),
            partial=parts[num_sources],
            depth_keys=tuple(slots[::2]),
            depth_values=tuple(slots[1::2]),
            first_value=parts[-1] if shapes.first_value else None,
        )
