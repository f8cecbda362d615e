"""The plan of MoDA's slots, derived from the config: which sublayers write slots, and how many each layer reads."""

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

from .depth_options import DepthKVType

# Entries of `layer_types`: linear attention (since transformers 5.24 also state-space mixers), short convolutions and
# state-space mixers.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba"})


@dataclass(frozen=True)
class DepthSlotPlan:
    """Numbers of slots read, and layers that write slots; the order of slots is attention 0, MLP 0, attention 1, ...

    A slot that no layer reads is not written: a slot after the last layer that reads (so the last MLP has no
    projections), or one that leaves the window of `num_depth_slots` before a layer reads.

    Attributes:
        num_read: number of slots that attention reads, for every layer.
        attention_writes: indices of layers whose attention writes a slot.
        mlp_writes: indices of layers whose MLP writes a slot.
    """

    num_read: tuple[int, ...]
    attention_writes: frozenset[int]
    mlp_writes: frozenset[int]


def linear_attention_layers(host_config: PreTrainedConfig) -> frozenset[int]:
    """Return the indices of layers without softmax attention, which do not read slots or write slots of attention."""
    layer_types = getattr(host_config, "layer_types", None) or getattr(host_config, "layers_block_type", None) or ()
    return frozenset(i for i, layer_type in enumerate(layer_types) if layer_type in _WITHOUT_ATTENTION)


def plan_depth_slots(
    host_config: PreTrainedConfig, depth_kv: str | None, num_depth_slots: int | None
) -> DepthSlotPlan:
    """Return the plan for a host.

    Args:
        host_config: the host's config.
        depth_kv: a `DepthKVType`, or `None` without slots.
        num_depth_slots: maximum number of slots that a layer reads, the newest ones; `None`: all.
    """
    num_layers = host_config.num_hidden_layers
    if depth_kv is None:
        return DepthSlotPlan((0,) * num_layers, frozenset(), frozenset())
    without_attention = linear_attention_layers(host_config)
    slots: list[tuple[str, int]] = []
    read: set[tuple[str, int]] = set()
    num_read = []
    for layer in range(num_layers):
        visible: list[tuple[str, int]] = []
        if layer not in without_attention:
            visible = slots if num_depth_slots is None else slots[-num_depth_slots:]
            read.update(visible)
        num_read.append(len(visible))
        if layer not in without_attention:
            slots = [*slots, ("attention", layer)]
        if depth_kv == DepthKVType.ATTENTION_MLP:
            slots = [*slots, ("mlp", layer)]
    return DepthSlotPlan(
        tuple(num_read),
        frozenset(layer for kind, layer in read if kind == "attention"),
        frozenset(layer for kind, layer in read if kind == "mlp"),
    )
