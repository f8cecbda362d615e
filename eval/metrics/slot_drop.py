"""`slot_drop`: loss without some of MoDA's depth slots, an ablation to compare with `slot_mass`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .probing.interventions import drop_slots, visible_slots
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotDrop(MetricResult):
    """Result of `slot_drop`: loss with dropped slots minus loss of the model, in nats.

    Attributes:
        slots: names of all slots that any layer reads, in writing order.
        by_slot: one value per slot, dropped in all layers that read it.
        by_slot_controls: for each slot, the mean of `by_slot` over the other slots, i.e. the expected value for a
            random other slot; NaN with a single slot.
        by_layer: [L], all slots dropped in one layer; NaN for layers that read none.
        loss: loss of the unchanged model.
    """

    slots: tuple[str, ...]
    by_slot: Tensor
    by_slot_controls: Tensor
    by_layer: Tensor
    loss: float


@depth_metric
def slot_drop(probe: DepthProbe, text: TextBatches) -> SlotDrop:
    """Measure the loss without depth slots (MoDA, arXiv 2603.15619; control as in arXiv 2606.13168).

        softmax over the sequence's keys and the remaining slots, renormalised

    Args:
        probe: a model with MoDA.
        text: the text.

    Raises:
        ValueError: for a model without MoDA.
    """
    if not probe.has_slots:
        raise ValueError(f"depth_kv: a {probe.family!r} model has no depth slots; use a model with MoDA")
    config, layers = probe.depth_config, probe.layers
    visible = visible_slots(config)
    slots = list(dict.fromkeys(slot for of_layer in visible for slot in of_layer))
    slots.sort(key=lambda slot: (slot[1], slot[0] == "mlp"))
    readers = [index for index, of_layer in enumerate(visible) if of_layer]
    # A slot is only read by layers after the one that writes it.
    changes = [(slot[1], partial(drop_slots, config, layers, {slot})) for slot in slots]
    changes += [(i, partial(drop_slots, config, layers, set(visible[i]), readers={i})) for i in readers]
    loss, changed = probe.losses(text, changes)
    increases = torch.tensor(changed, dtype=torch.float64) - loss
    by_slot = increases[: len(slots)]
    by_layer = torch.full((probe.num_layers,), torch.nan, dtype=torch.float64)
    by_layer[readers] = increases[len(slots) :]
    controls = torch.full_like(by_slot, torch.nan)
    if len(slots) > 1:
        controls = (by_slot.sum() - by_slot) / (len(slots) - 1)
    return SlotDrop(
        slots=tuple(f"{kind} {layer}" for kind, layer in slots),
        by_slot=by_slot,
        by_slot_controls=controls,
        by_layer=by_layer,
        loss=loss,
    )


def _num_drops(probe: DepthProbe) -> float:
    visible = visible_slots(probe.depth_config)
    return 1.0 + (len({slot for slots in visible for slot in slots}) + sum(map(bool, visible))) / 2


METRICS = {"slot_drop": DepthMetric(slot_drop, _num_drops, False, lambda probe: probe.has_slots)}
