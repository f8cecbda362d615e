"""The section with the slider: what one layer reads, whom it affects, and its numbers."""

from __future__ import annotations

from typing import Any

from .drawing import DrawnFigure
from .figure import Models
from .figure_registry import FIGURES

NAME = "layer"


def layer_section(models: Models) -> DrawnFigure:
    """Charts that show one layer, that of the parameter `layer`."""
    return DrawnFigure(
        name=NAME,
        title="One layer",
        how=(
            "Move the slider to see what one layer reads, whom it affects, and its numbers beside those of the other "
            "model. Axes and colours stay the same for all layers. Layer 0 reads no depth slots, and its attention "
            "reads the embedding alone."
        ),
        limits=(
            "Weight and mass are not importance: the row of the loss without the layer is the one that measures an "
            "effect."
        ),
        findings=(),
        panels=tuple(panel for figure in FIGURES.values() for panel in figure.layer_panels(models)),
    )


def layer_numbers(models: Models) -> list[dict[str, Any]]:
    """Lines of the table, as JSON values: a title, and by model one number per layer."""
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
