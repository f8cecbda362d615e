"""The section "One layer" with the slider: what one layer reads, which layers it affects, and its numbers."""

from __future__ import annotations

from typing import Any

from .drawing import DrawnFigure
from .figure import Models
from .figure_registry import FIGURES

NAME = "layer"


def layer_section(models: Models) -> DrawnFigure:
    """Return the charts that show one layer, chosen by the chart parameter `layer`."""
    return DrawnFigure(
        name=NAME,
        title="One layer",
        how=(
            "Move the slider to see what one layer reads, which later layers it affects, and its numbers for each "
            "model. Axes and colours are the same for all layers. Layer 0 has no depth slots to read, and its "
            "attention reads only the embedding."
        ),
        limits=(
            "Weight and mass do not measure importance; the row with the loss increase without the layer measures an "
            "effect."
        ),
        findings=(),
        panels=tuple(panel for figure in FIGURES.values() for panel in figure.layer_panels(models)),
    )


def layer_numbers(models: Models) -> list[dict[str, Any]]:
    """Return the lines of the table as JSON values: a title, and per model one number per layer."""
    lines = sorted((line for figure in FIGURES.values() for line in figure.layer_lines), key=lambda line: line.place)
    table = []
    for line in lines:
        values = [
            line.values_of(model.metrics[line.metric])
            if line.metric in model.metrics
            else [None] * model.info.num_layers
            for model in models
        ]
        if any(value is not None for column in values for value in column):
            table.append({"title": line.title, "values": [[_short(value) for value in column] for column in values]})
    return table


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
