"""The plan of MoDA's slots, derived from the config: which sublayers write slots, and which of them each layer reads.

A slot has the number of the sublayer that writes it: 2 i for the attention and 2 i + 1 for the MLP of layer i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

from .depth_options import DepthKVType

# Entries of `layer_types`: linear attention (since transformers 5.24 also state-space mixers), short convolutions and
# state-space mixers.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba"})


@dataclass(frozen=True)
class DepthSlotPlan:
    """The slots that each layer reads.

    A slot that no layer reads is not written (so the last MLP has no projections), and a slot is dropped from the
    depth state after the last layer that reads it.

    Attributes:
        reads: numbers of the slots that attention reads, for every layer, in the order in which they are written.
    """

    reads: tuple[tuple[int, ...], ...]

    @property
    def num_read(self) -> tuple[int, ...]:
        """Numbers of slots that attention reads, for every layer."""
        return tuple(map(len, self.reads))

    @property
    def attention_writes(self) -> frozenset[int]:
        """Indices of layers whose attention writes a slot."""
        return frozenset(slot // 2 for slots in self.reads for slot in slots if slot % 2 == 0)

    @property
    def mlp_writes(self) -> frozenset[int]:
        """Indices of layers whose MLP writes a slot."""
        return frozenset(slot // 2 for slots in self.reads for slot in slots if slot % 2 == 1)

    def present(self, layer: int) -> tuple[int, ...]:
        """Return the slots in the depth state before a layer: those that it or a later layer reads.

        Args:
            layer: index of the layer, or the number of layers for the state after the last one.
        """
        read = {slot for slots in self.reads[layer:] for slot in slots}
        return tuple(sorted(slot for slot in read if slot < 2 * layer))


def linear_attention_layers(host_config: PreTrainedConfig) -> frozenset[int]:
    """Return the indices of layers without softmax attention, which do not read slots or write slots of attention."""
    layer_types = getattr(host_config, "layer_types", None) or getattr(host_config, "layers_block_type", None) or ()
    return frozenset(i for i, layer_type in enumerate(layer_types) if layer_type in _WITHOUT_ATTENTION)


def readable_slots(host_config: PreTrainedConfig, depth_kv: str, layer: int) -> tuple[int, ...]:
    """Return the numbers of all slots that a layer can read: those of earlier sublayers, if the layer has attention.

    Args:
        host_config: the host's config.
        depth_kv: a `DepthKVType`.
        layer: index of the layer.
    """
    without_attention = linear_attention_layers(host_config)
    if layer in without_attention:
        return ()
    slots = []
    for writer in range(layer):
        if writer not in without_attention:
            slots.append(2 * writer)
        if depth_kv == DepthKVType.ATTENTION_MLP:
            slots.append(2 * writer + 1)
    return tuple(slots)


def plan_depth_slots(
    host_config: PreTrainedConfig,
    depth_kv: str | None,
    num_depth_slots: int | None = None,
    depth_slots: Sequence[Sequence[int]] | None = None,
) -> DepthSlotPlan:
    """Return the plan for a host.

    Args:
        host_config: the host's config.
        depth_kv: a `DepthKVType`, or `None` without slots.
        num_depth_slots: maximum number of slots that a layer reads, the newest ones; `None`: all.
        depth_slots: the slots that each layer reads, instead.
    """
    num_layers = host_config.num_hidden_layers
    if depth_kv is None:
        return DepthSlotPlan(((),) * num_layers)
    if depth_slots is not None:
        return DepthSlotPlan(tuple(map(tuple, depth_slots)))
    newest = slice(None) if num_depth_slots is None else slice(-num_depth_slots, None)
    return DepthSlotPlan(tuple(readable_slots(host_config, depth_kv, layer)[newest] for layer in range(num_layers)))


def check_depth_slots(host_config: PreTrainedConfig, depth_kv: str, depth_slots: Sequence[Sequence[int]]) -> None:
    """Check the option `depth_slots`.

    Args:
        host_config: the host's config.
        depth_kv: a `DepthKVType`.
        depth_slots: the slots that each layer reads.

    Raises:
        ValueError: if the number of lists is not that of layers, or a layer cannot read a slot; the message names the
            layer and the allowed values.
    """
    num_layers = host_config.num_hidden_layers
    if len(depth_slots) != num_layers:
        raise ValueError(
            f"depth_slots: {len(depth_slots)} lists, but num_hidden_layers is {num_layers}; give one list per layer."
        )
    for layer, slots in enumerate(depth_slots):
        allowed = readable_slots(host_config, depth_kv, layer)
        listed = ", ".join(map(str, allowed)) or "none, so its list must be empty"
        for slot in slots:
            if slot not in allowed:
                raise ValueError(f"depth_slots: layer {layer} cannot read slot {slot}; allowed are {listed}.")
        if list(slots) != sorted(set(slots)):
            raise ValueError(
                f"depth_slots: layer {layer} has {list(slots)}; list every slot once, in ascending order, out of "
                f"{listed}."
            )
