"""The tensors of the depth state between two decoder layers, by name and size, from the config alone."""

from collections.abc import Sequence
from typing import NamedTuple

from ..configuration_depthattn import DepthAttnConfig
from ..depth_connections import connection_class
from ..host_attention import depth_kv_shape
from ..value_residual import value_layers

# Names of the number of experts in configs of hosts.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class StateItem(NamedTuple):
    """The name of one tensor that the layers after a boundary need from those before it.

    Attributes:
        kind: one of

            | kind           | shape              | index                                                         |
            |----------------|--------------------|---------------------------------------------------------------|
            | `source`       | `[B, T, D]`        | number of the source in the unsplit model                     |
            | `partial`      | `[B, T, D]`,       | site before which it has this value; `[B, T, n, D]` with      |
            |                | `[B, T, n, D]`     | several streams                                               |
            | `depth_key`    | `[B, Hk, T, d]`    | number of the slot                                            |
            | `depth_value`  | `[B, Hk, T, dv]`   | number of the slot                                            |
            | `first_value`  | `[B, T, Hk dv]`    | the first attention layer                                     |
            | `router_logits`| `[B T, experts]`   | the layer                                                     |
        index: number of the item among those of its kind.
    """

    kind: str
    # It hides a method of tuples.
    index: int  # type: ignore[assignment]


class StateItems(NamedTuple):
    """The items of a depth state between two layers, at their places in `DepthState`.

    Attributes:
        sources: items of `sources`, only those that later layers read, oldest first.
        partial: item of `partial`. A finished block that the next write adds to the sources is already the `source`
            that it becomes, so that no device gets it twice.
        depth_keys: items of `depth_keys`, those of every slot that a later layer reads, oldest first.
        depth_values: items of `depth_values`, of the same slots.
        first_value: item of `first_value`, if a later layer reads it.
    """

    sources: tuple[StateItem, ...]
    partial: StateItem
    depth_keys: tuple[StateItem, ...]
    depth_values: tuple[StateItem, ...]
    first_value: StateItem | None


def depth_state_items(config: DepthAttnConfig, layer: int) -> StateItems:
    """Return the items that the depth state needs at the entry of a layer.

    Args:
        config: the model's config.
        layer: index of the layer, not 0.
    """
    site, connection = 2 * layer, connection_class(config)
    is_source = connection.partial_is_source(config, site)
    partial = ("source", connection.num_finished_sources(config, site)) if is_source else ("partial", site)
    slots = config.depth_slot_plan.present(layer)
    attention = value_layers(config)
    crosses = bool(attention) and attention[0] < layer <= attention[-1]
    return StateItems(
        tuple(StateItem("source", source) for source in connection.live_sources(config, site)),
        StateItem(*partial),
        tuple(StateItem("depth_key", slot) for slot in slots),
        tuple(StateItem("depth_value", slot) for slot in slots),
        StateItem("first_value", attention[0]) if crosses else None,
    )


def state_items(config: DepthAttnConfig, layer: int, routers: Sequence[int] = ()) -> tuple[StateItem, ...]:
    """Return all items that layers from `layer` on need from those before it.

    Args:
        config: the model's config.
        layer: index of the layer, not 0.
        routers: the layers whose router logits the loss uses; it is computed after the last layer.
    """
    items = depth_state_items(config, layer)
    first_value = () if items.first_value is None else (items.first_value,)
    router_logits = tuple(StateItem("router_logits", router) for router in routers if router < layer)
    return (*items.sources, items.partial, *items.depth_keys, *items.depth_values, *first_value, *router_logits)


def sources_after(config: DepthAttnConfig, layers: range) -> tuple[StateItem, ...]:
    """Return the items of `sources` when a stage has run its layers, whether later layers read them or not.

    Args:
        config: the model's config.
        layers: the layers of the stage, which entered the first one with the sources of `depth_state_items`.
    """
    connection = connection_class(config)
    entering = () if layers.start == 0 else depth_state_items(config, layers.start).sources
    first = 0 if layers.start == 0 else connection.num_finished_sources(config, 2 * layers.start)
    new = range(first, connection.num_finished_sources(config, 2 * layers.stop))
    return (*entering, *(StateItem("source", source) for source in new))


def items_read(config: DepthAttnConfig, items: Sequence[StateItem], layers: range) -> frozenset[StateItem]:
    """Return the items that a stage itself reads, out of those at its entry.

    Args:
        config: the model's config.
        items: `state_items(config, layers.start)`.
        layers: the layers of the stage.
    """
    slots = {slot for reads in config.depth_slot_plan.reads[layers.start : layers.stop] for slot in reads}
    mixes_values = any(layer in layers for layer in value_layers(config))
    is_last = layers.stop == config.host_config.num_hidden_layers

    def reads(item: StateItem) -> bool:
        if item.kind in ("depth_key", "depth_value"):
            return item.index in slots
        if item.kind == "first_value":
            return mixes_values
        return is_last or item.kind != "router_logits"

    return frozenset(item for item in items if reads(item))


def item_channels(config: DepthAttnConfig, item: StateItem) -> int:
    """Return the number of elements of an item per token.

    Args:
        config: the model's config.
        item: the item.

    Raises:
        ValueError: for router logits, if the host's config has no number of experts.
    """
    host = config.host_config
    if item.kind == "source":
        return config.hidden_size
    if item.kind == "partial":
        return config.hidden_size * connection_class(config).num_partial_streams(config)
    if item.kind == "router_logits":
        for name in _NUM_EXPERTS:
            if (num_experts := getattr(host, name, None)) is not None:
                return num_experts
        raise ValueError(f"text_config: {host.model_type!r} has none of the fields {', '.join(_NUM_EXPERTS)}.")
    shape = depth_kv_shape(host)
    return shape.num_kv_heads * (shape.key_dim if item.kind == "depth_key" else shape.value_dim)
