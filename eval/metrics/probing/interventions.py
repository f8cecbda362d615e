"""Context managers that skip, replace or swap decoder layers, or drop slots; all changes are undone on exit.

The conventions are in the docstring of `probe`. The hooks run before those registered earlier, so that observers of a
layer see the changed output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ....attn_res_reads import DEPTH_READS, DepthReads
from ....configuration_depthattn import DepthAttnConfig
from ....connection_base import DepthSite
from ....depth_connections import DEPTH_MODULES
from ....depth_layer import DepthAttnDecoderLayer
from ....depth_options import AttnResSchedule
from ....depth_state import DepthState
from ....integrations.trainer import is_depth_name
from .sublayers import Sublayer

# Attribute of sites that scale the inputs of their layer's sublayers (LayerNorm Scaling).
_SITE_NUMBER = "input_scale"

#: A MoDA slot: the kind (`"attn"` or `"mlp"`) and the layer of the sublayer that wrote it.
Slot = tuple[str, int]


class SlotSkip(StrEnum):
    """How later layers see the slots of a skipped MoDA layer.

    `zero` (DepthBench): zero keys and values, which still get the weight of a logit of 0. `removed`: excluded from the
    softmax.
    """

    ZERO = "zero"
    REMOVED = "removed"


class MixSkip(StrEnum):
    """What the site after a skipped AttnRes layer reads.

    `remix`: its own read over the remaining sources; with zero queries and `read_scale="sum"` this equals skipping the
    host's layer. `newest` (DepthBench): its newest source alone. In DepthBench that source is a layer output that
    includes the residual stream; here it is the sum of one block, so `newest` hides all other sources.
    """

    REMIX = "remix"
    NEWEST = "newest"


def own_layers(layers: nn.ModuleList) -> list[DepthAttnDecoderLayer]:
    """The layers of a model with depth attention; those of remote code have a copy of the class."""
    return cast(list[DepthAttnDecoderLayer], list(layers))


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a layer's call, `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def replace_layer(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of a stock layer by `function` of its input.

    Args:
        layer: the decoder layer.
        function: [B, T, D] to [B, T, D].
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        replaced = function(first_argument(args, kwargs))
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    with layer.register_forward_hook(hook, with_kwargs=True, prepend=True):
        yield


@contextmanager
def replace_sublayer(sublayer: Sublayer, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of a sublayer by `function` of its input.

    Args:
        sublayer: the sublayer.
        function: [B, T, D] to [B, T, D].
    """
    inputs: list[Tensor] = []

    def see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [first_argument(args, kwargs)]

    def change_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        replaced = function(inputs.pop()) / sublayer.scale
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    with (
        sublayer.input_module.register_forward_pre_hook(see_input, with_kwargs=True),
        sublayer.output_module.register_forward_hook(change_output, prepend=True),
    ):
        yield


@contextmanager
def replace_depth_layer(
    config: DepthAttnConfig, layers: nn.ModuleList, index: int, function: Callable[[Tensor], Tensor], slots: SlotSkip
) -> Iterator[None]:
    """Replace the state after a layer of this package that only has a residual stream, or n streams.

    Args:
        config: the model's config.
        layers: its decoder layers.
        index: index of the layer.
        function: [B, T, D] to [B, T, D], or with n streams [B, T, n D] to [B, T, n D].
        slots: how later layers see its slots.
    """

    def after(layer: DepthAttnDecoderLayer, state: DepthState) -> DepthState:
        # A layer maps n streams [B, T, n, D] as one tensor [B, T, n D].
        width = state.partial.shape[2:]
        return state._replace(partial=function(state.partial.flatten(2)).unflatten(2, width))

    with _changed_depth_layer(config, layers, index, after, slots):
        yield


@contextmanager
def skip_depth_layer(
    config: DepthAttnConfig, layers: nn.ModuleList, index: int, slots: SlotSkip, mix: MixSkip
) -> Iterator[None]:
    """Skip a layer of this package: the depth state after it is that before it, or has zeros as its outputs.

    Args:
        config: the model's config.
        layers: its decoder layers.
        index: index of the layer.
        slots: how later layers see its MoDA slots.
        mix: what the site after it reads.
    """
    layer = own_layers(layers)[index]
    numbers_sources = any(site.numbers_sources for site in (layer.attn_depth, layer.mlp_depth))

    def after(layer: DepthAttnDecoderLayer, state: DepthState) -> DepthState:
        if numbers_sources:
            nothing = torch.zeros_like(state.partial)
            state = layer.mlp_depth.write(layer.attn_depth.write(state, nothing), nothing)
        return state

    with ExitStack() as stack:
        begins_block = any(getattr(site, "starts_block", False) for site in (layer.attn_depth, layer.mlp_depth))
        if begins_block and not numbers_sources and index + 1 < len(layers):
            # Otherwise the next layer would continue the block before the skipped layer.
            stack.enter_context(attribute(layers[index + 1].attn_depth, "starts_block", True))
        consumer = right_boundary(layers, index)
        if mix == MixSkip.NEWEST and hasattr(consumer, "starts_block"):
            stack.enter_context(consumer.register_forward_hook(_reads_newest, prepend=True))
        stack.enter_context(_changed_depth_layer(config, layers, index, after, slots))
        yield


def _reads_newest(site: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].open_block, *output[1:])


@contextmanager
def _changed_depth_layer(
    config: DepthAttnConfig,
    layers: nn.ModuleList,
    index: int,
    after: Callable[[DepthAttnDecoderLayer, DepthState], DepthState],
    slots: SlotSkip,
) -> Iterator[None]:
    """Replace the state after a layer by `after(layer, state before it)`, and zero its slots."""

    def hook(layer: DepthAttnDecoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = first_argument(args, kwargs)
        state = after(layer, layer.attn_depth.begin(before) if layer.is_first else before)
        if layer.out_depth is not None:
            return layer.out_depth(state, kwargs.get(DEPTH_READS))[0]
        written = _num_written(layer)
        return state._replace(
            depth_keys=_newest_zero(output.depth_keys, written),
            depth_values=_newest_zero(output.depth_values, written),
            # Later layers cannot do without the values of the first attention layer.
            first_value=output.first_value,
        )

    with ExitStack() as stack:
        if slots == SlotSkip.REMOVED:
            stack.enter_context(drop_slots(config, layers, {("attn", index), ("mlp", index)}))
        stack.enter_context(layers[index].register_forward_hook(hook, with_kwargs=True, prepend=True))
        yield


def _num_written(layer: DepthAttnDecoderLayer) -> int:
    if layer.depth_kv is None:
        return 0
    return int(layer.depth_kv.attention_writes) + int(layer.mlp_depth_kv is not None)


def _newest_zero(slots: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    kept = max(0, len(slots) - count)
    return (*slots[:kept], *(torch.zeros_like(slot) for slot in slots[kept:]))


def visible_slots(config: DepthAttnConfig) -> list[list[Slot]]:
    """Return the slots that each layer's attention reads, oldest first.

    Args:
        config: the model's config.
    """
    kinds = ("attn", "mlp")
    return [[(kinds[slot % 2], slot // 2) for slot in slots] for slots in config.depth_slot_plan.reads]


@contextmanager
def drop_slots(
    config: DepthAttnConfig, layers: nn.ModuleList, dropped: Collection[Slot], readers: Collection[int] | None = None
) -> Iterator[None]:
    """Exclude some MoDA slots from the softmax, which renormalises the other weights.

    Args:
        config: a config with or without `depth_kv`.
        layers: the decoder layers.
        dropped: slots to drop.
        readers: layers that do not read them; all by default.

    Raises:
        ValueError: if nested inside another `drop_slots` or `keep_slots`.
    """
    if config.depth_kv is None:
        yield
        return
    kept = [
        [slot for slot in slots if slot not in dropped or (readers is not None and index not in readers)]
        for index, slots in enumerate(visible_slots(config))
    ]
    with keep_slots(config, layers, kept):
        yield


@contextmanager
def keep_slots(config: DepthAttnConfig, layers: nn.ModuleList, kept: Sequence[Collection[Slot]]) -> Iterator[None]:
    """Exclude all but some MoDA slots of each layer from the softmax, which renormalises the other weights.

    Args:
        config: a config with `depth_kv`.
        layers: the decoder layers.
        kept: for each layer, the slots that it reads.

    Raises:
        ValueError: if nested inside another `drop_slots` or `keep_slots`.
    """
    if any("open" in vars(layer.depth_kv) for layer in own_layers(layers)):
        raise ValueError("dropped: drop_slots cannot be nested; pass all slots in one call")
    with ExitStack() as stack:
        for layer, slots, of_layer in zip(own_layers(layers), visible_slots(config), kept, strict=True):
            positions = [position for position, slot in enumerate(slots) if slot in of_layer]
            if len(positions) < len(slots):
                stack.enter_context(attribute(layer.depth_kv, "open", _opens_some(layer.depth_kv.open, positions)))
        yield


def _opens_some(open_exchange: Callable[..., Any], kept: list[int]) -> Callable[..., Any]:
    def opened(*args: Any, **kwargs: Any) -> Any:
        exchange = open_exchange(*args, **kwargs)
        exchange.keys = tuple(exchange.keys[position] for position in kept)
        exchange.values = tuple(exchange.values[position] for position in kept)
        return exchange

    return opened


def right_boundary(layers: nn.ModuleList, index: int) -> DepthSite:
    """Return the site that reads after a layer: the next layer's attention site, or the output site."""
    own = own_layers(layers)
    return cast(DepthSite, own[index].out_depth) if index + 1 == len(own) else own[index + 1].attn_depth


def signature(layer: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return names, shapes and dtypes of a layer's tensors without depth modules; layers must match to be swapped."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in _tensors(layer).items() if not is_depth_name(name)}


@contextmanager
def swap_layers(
    layers: nn.ModuleList, first: int, second: int, depth_reads: DepthReads | None = None, *, moves_reads: bool = False
) -> Iterator[None]:
    """Swap the learned weights of two layers, with those of their own sites.

    Depth parameters that only one of the two layers has, or that differ in shape, are not swapped.

    Args:
        layers: the decoder layers.
        first, second: indices of the layers; they must have the same `signature`.
        depth_reads: the queries and key-norm weights of AttnRes sites.
        moves_reads: whether the site after a layer moves with it, while its own attention site stays: connections
            whose sites read a growing number of sources.

    Raises:
        ValueError: if the signatures differ.
    """
    one, other = layers[first], layers[second]
    if signature(one) != signature(other):
        raise ValueError(f"layers {first} and {second} have different weights and cannot be swapped")
    pairs = _matching(_learned(one, moves_reads), _learned(other, moves_reads))
    if moves_reads:
        pairs += _matching(_tensors(right_boundary(layers, first)), _tensors(right_boundary(layers, second)))
    swapped = [(a, b.data.to(a.device)) for pair in pairs for a, b in (pair, pair[::-1])]
    if depth_reads is not None:
        # Of each layer, the rows of its MLP site and of the site after it.
        one_rows, other_rows = ([2 * index + 1, 2 * index + 2] for index in (first, second))
        rows = torch.arange(2 * len(layers) + 1)
        rows[one_rows + other_rows] = rows[other_rows + one_rows]
        swapped += [(parameter, parameter.data[rows]) for parameter in depth_reads.parameters()]
    originals = [(tensor, tensor.data) for tensor, _ in swapped]
    with ExitStack() as stack:
        for site, number in _swapped_numbers(one, other):
            stack.enter_context(attribute(site, _SITE_NUMBER, number))
        try:
            for tensor, data in swapped:
                tensor.data = data
            yield
        finally:
            for tensor, data in originals:
                tensor.data = data


def _swapped_numbers(one: nn.Module, other: nn.Module) -> list[tuple[nn.Module, float]]:
    """Return sites with a fixed number that moves with its layer, and the number of the other layer."""
    pairs = [(getattr(one, name, None), getattr(other, name, None)) for name in DEPTH_MODULES]
    numbers = [(a, b, getattr(a, _SITE_NUMBER, None), getattr(b, _SITE_NUMBER, None)) for a, b in pairs]
    return [
        (cast(nn.Module, site), number)
        for a, b, of_a, of_b in numbers
        if of_a is not None and of_b is not None
        for site, number in ((a, of_b), (b, of_a))
    ]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _learned(layer: nn.Module, moves_reads: bool) -> dict[str, Tensor]:
    stays = ("attn_depth.", "out_depth.") if moves_reads else ("out_depth.",)
    return {name: tensor for name, tensor in _tensors(layer).items() if not name.startswith(stays)}


def _matching(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(one[name], other[name]) for name in one if name in other and one[name].shape == other[name].shape]


@contextmanager
def single_reads(config: PreTrainedConfig) -> Iterator[None]:
    """Let every AttnRes site of a model read all its sources itself.

    Args:
        config: the model's config; stock models stay as they are.
    """
    if not hasattr(config, "attn_res_schedule"):
        yield
        return
    own = cast(DepthAttnConfig, config)
    before, own.attn_res_schedule = own.attn_res_schedule, AttnResSchedule.SINGLE
    try:
        yield
    finally:
        own.attn_res_schedule = before


@contextmanager
def without_layers(layers: nn.ModuleList, state: Tensor, *, as_tuple: bool) -> Iterator[None]:
    """Bypass all layers: the last one returns `state`.

    Args:
        layers: the decoder layers.
        state: [B, T, D].
        as_tuple: whether layers return tuples.
    """

    def returns(result: Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = first_argument(args, kwargs) if result is None else result
            return (output,) if as_tuple else output

        return forward

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            result = state if index == len(layers) - 1 else None
            stack.enter_context(attribute(layer, "forward", returns(result)))
        yield


@contextmanager
def attribute(target: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of an object and restore it on exit."""
    own = vars(target)
    missing = object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before
