"""Figure of angles between states, and of block influence."""

from __future__ import annotations

from ..charts import heat_map
from ..figure import Figure, LayerLine, Models, Panel, SummaryLine
from ..rows import curve_panels, found, matrix_rows, numbers, per_layer, titled
from ..sentences import argmax, argmin, field_values, mean_text, no_number, number


def _panels(models: Models) -> list[Panel]:
    angles = per_layer(models, "angular_distance", "adjacent")
    influence = per_layer(models, "block_influence", "scores")
    panels = [
        *curve_panels(models, "From one state to the next", angles, "angle / π", zero=True),
        *curve_panels(models, "Block influence", influence, "1 − cos(in, out)", zero=True),
    ]
    for name, result in found(models, "angular_distance"):
        states = numbers(len(result["distances"]))
        cells = matrix_rows(result["distances"], states, states)
        if not cells:
            continue
        chart = heat_map(
            cells,
            x="state",
            y="state",
            value="angle / π",
            columns=states[1:],
            lines=states[:-1],
            # Fixed domain, so that all reports have the same colours; 0.5 is a right angle.
            domain=(0.0, 0.6),
        )
        panels.append(Panel(titled(models, name, "Any two states"), chart))
    return panels


def _findings(models: Models) -> list[str]:
    """Name the layers that rotate the state most and least."""
    said = []
    for name, result in found(models, "angular_distance"):
        adjacent = result["adjacent"]
        top, low = argmax(adjacent), argmin(adjacent)
        if top is None or low is None:
            said.append(no_number(name))
            continue
        said.append(
            f"{name}: layer {top} rotates the state most (angle / π = {number(adjacent[top])}), layer {low} least "
            f"({number(adjacent[low])})."
        )
    return said


FIGURE = Figure(
    place=130,
    title="How far each layer rotates the state",
    how=(
        "Mean angle between two states over all tokens: 0 is the same direction, 0.5 a right angle. Block influence "
        "is 1 minus the cosine."
    ),
    limits=(
        "A poor proxy for importance: a small rotation can matter, and a large one need not. The colour scale is "
        "fixed, so that reports can be compared."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            80,
            "mean rotation per layer (angle / π)",
            "How far a layer rotates the state; a poor proxy for importance.",
            "angular_distance",
            mean_text("adjacent"),
        ),
        SummaryLine(
            90,
            "mean block influence",
            "1 − cosine between a layer's input and output; also a poor proxy.",
            "block_influence",
            mean_text("scores"),
        ),
    ),
    layer_lines=(LayerLine(80, "angle to the next state / π", "angular_distance", field_values("adjacent")),),
)
