"""Which sublayers write depth keys and values for MoDA, and who reads them: a table made from the config alone."""

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

from .depth_options import DepthKVType

# In `layer_types`: linear attention (and, since transformers 5.24, state-space mixers), short convolutions, mixers.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba"})


@dataclass(frozen=True)
class DepthSlotPlan:
    """Slots in the order in which they are written: attention 0, MLP 0, attention 1, ...

    A slot that nobody reads is not written. Those are the slots after the last reader (the last MLP has no projection)
    and, with `num_depth_slots`, those that fall out of the window before a layer reads.

    Attributes:
        num_read: layer -> slots that its attention reads.
        attention_writes: layers whose attention sublayer writes a slot.
        mlp_writes: layers whose MLP sublayer writes one.
    """

    num_read: tuple[int, ...]
    attention_writes: frozenset[int]
    mlp_writes: frozenset[int]


def linear_attention_layers(host_config: PreTrainedConfig) -> frozenset[int]:
    """Layers without softmax attention; they neither read depth slots nor write keys of their attention."""
    layer_types = getattr(host_config, "layer_types", None) or getattr(host_config, "layers_block_type", None) or ()
    return frozenset(i for i, layer_type in enumerate(layer_types) if layer_type in _WITHOUT_ATTENTION)


def plan_depth_slots(
    host_config: PreTrainedConfig, depth_kv: str | None, num_depth_slots: int | None
) -> DepthSlotPlan:
    """The plan for a host.

    Args:
        host_config: the host's config.
        depth_kv: a `DepthKVType`, or `None` for no slots.
        num_depth_slots: read only this many newest slots; `None` reads all.
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
