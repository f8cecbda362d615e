"""The weight of MoDA's slots in the joint softmax.

A weight does not measure importance (arXiv 2606.13168): compare with `slot_drop`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.interventions import visible_slots
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class SlotMass(MetricResult):
    """Result of `slot_mass` for H query heads; NaN where a layer does not read a slot.

    Attributes:
        slots: names of all slots that any layer reads, in writing order.
        by_slot: [L, H, slots], mean weight over tokens.
        totals: [L, H], weight of all slots; the rest up to 1 is that of the sequence (and of attention sinks).
        attention: [L, H], weight of slots written by attention sublayers.
        mlp: [L, H], weight of slots written by MLP sublayers; NaN without them.
        attention_by_age: [L, L], mean over heads; column a is the slot written by layer l - a, column 0 is empty.
        mlp_by_age: [L, L], the same for MLP slots.
        by_position: [L, T], `totals` by position of the token, mean over heads; early tokens have few keys.
        uniform: [L], `totals` of uniform attention over all keys and slots.
        gated: whether the weights include the gate of each head, which can make them negative.
    """

    slots: tuple[str, ...]
    by_slot: Tensor
    totals: Tensor
    attention: Tensor
    mlp: Tensor
    attention_by_age: Tensor
    mlp_by_age: Tensor
    by_position: Tensor
    uniform: Tensor
    gated: bool


@depth_metric
def slot_mass(probe: DepthProbe, text: TextBatches) -> SlotMass:
    """Measure the weight of MoDA's slots in the joint softmax (MoDA, arXiv 2603.15619, Fig. 5).

        p_{l,h,i} = mean_t exp(s_i - lse_joint),    a uniform attention: mean_t n / (t + 1 + n) with n slots

    A gate is included, as in the output of the head. `uniform` assumes full causal attention, not a sliding window.

    Args:
        probe: a model with MoDA.
        text: the text.

    Raises:
        ValueError: for a model without MoDA, or if no layer reads a slot (a single layer).
    """
    if not probe.has_slots:
        raise ValueError(f"depth_kv: a {probe.family!r} model has no depth slots; use a model with MoDA")
    config = probe.depth_config
    visible = visible_slots(config)
    if not any(visible):
        raise ValueError(f"num_hidden_layers: no layer of {probe.num_layers} reads a depth slot")
    known = sorted({slot for slots in visible for slot in slots}, key=lambda slot: (slot[1], slot[0] == "mlp"))
    sums: dict[int, Tensor] = {}
    positions: dict[int, Tensor] = {}
    for ids in text:
        for layer, weights in enumerate(probe.run(ids, output_depth_attentions=True).depth_kv_attentions):
            if weights is None:
                continue
            weights = weights.double()  # [B, H, T, n]
            sums[layer] = sums.get(layer, 0) + weights.sum(dim=(0, 2)).cpu()
            positions[layer] = positions.get(layer, 0) + weights.sum(dim=(0, -1)).mean(dim=0).cpu()
    number, heads = probe.num_layers, max(len(total) for total in sums.values())
    by_slot = torch.full((number, heads, len(known)), torch.nan, dtype=torch.float64)
    by_position = torch.full((number, text.sequence_length), torch.nan, dtype=torch.float64)
    uniform = torch.full((number,), torch.nan, dtype=torch.float64)
    num_keys = torch.arange(1, text.sequence_length + 1, dtype=torch.float64)
    for layer, total in sums.items():
        columns = [known.index(slot) for slot in visible[layer]]
        by_slot[layer][: len(total), columns] = total / text.num_tokens
        by_position[layer] = positions[layer] / text.num_sequences
        uniform[layer] = (len(columns) / (num_keys + len(columns))).mean()
    by_age = {kind: torch.full((number, number), torch.nan, dtype=torch.float64) for kind in ("attn", "mlp")}
    for layer, slots in enumerate(visible):
        for kind, writer in slots:
            by_age[kind][layer, layer - writer] = by_slot[layer, :, known.index((kind, writer))].nanmean()
    return SlotMass(
        slots=tuple(f"{kind} {layer}" for kind, layer in known),
        by_slot=by_slot,
        totals=_sum_known(by_slot),
        attention=_sum_known(by_slot[..., [kind == "attn" for kind, _ in known]]),
        mlp=_sum_known(by_slot[..., [kind == "mlp" for kind, _ in known]]),
        attention_by_age=by_age["attn"],
        mlp_by_age=by_age["mlp"],
        by_position=by_position,
        uniform=uniform,
        gated=config.depth_gate is not None,
    )


def _sum_known(weights: Tensor) -> Tensor:
    """Sum over the last axis ignoring NaN; NaN where all entries are NaN."""
    unknown = weights.isnan().all(dim=-1)
    return weights.nan_to_num(0.0).sum(dim=-1).masked_fill(unknown, torch.nan)


METRICS = {"slot_mass": DepthMetric(slot_mass, lambda probe: 1.2, True, lambda probe: probe.has_slots)}
