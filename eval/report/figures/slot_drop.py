"""Figure of the loss without MoDA's depth slots: one slot in all layers, or all slots of one layer."""

from __future__ import annotations

from ..charts import Rows, bars
from ..figure import Figure, Models, Panel
from ..rows import curve_panels, found, names_of, per_layer, titled
from ..sentences import signed


def _panels(models: Models) -> list[Panel]:
    panels = []
    for name, result in found(models, "slot_drop"):
        rows: Rows = [
            {"column": slot, "value": value, "control": control, "kind": name}
            for slot, value, control in zip(
                result["slots"], result["by_slot"], result["by_slot_controls"], strict=True
            )
        ]
        # A single layer has no slots to read.
        if not any(row["value"] is not None for row in rows):
            continue
        chart = bars(
            rows,
            x="dropped slot",
            y="loss increase (nats)",
            columns=result["slots"],
            kinds=names_of(models),
            controls="mean of the other slots",
        )
        panels.append(Panel(titled(models, name, "One slot dropped in all layers"), chart))
    increases = per_layer(models, "slot_drop", "by_layer")
    return panels + curve_panels(models, "One layer reads no slots", increases, "loss increase (nats)", zero=True)


def _findings(models: Models) -> list[str]:
    """Name the slot whose drop costs most."""
    said = []
    for name, result in found(models, "slot_drop"):
        increases = [
            (value, slot) for value, slot in zip(result["by_slot"], result["slots"], strict=True) if value is not None
        ]
        if increases:
            increase, slot = max(increases)
            said.append(f"{name}: dropping slot {slot} costs most, {signed(increase)} nats.")
    return said


FIGURE = Figure(
    place=60,
    title="Loss without depth slots (MoDA)",
    how=(
        "Bars: a slot is dropped in all layers that read it; the grey tick is the mean over the other slots, i.e. the "
        "expected cost of dropping a random slot. Curve: one layer reads no slots at all. Below 0, the model is "
        "better without them on this text."
    ),
    limits="Redundant slots look unimportant when they are dropped one at a time.",
    panels=_panels,
    findings=_findings,
)
