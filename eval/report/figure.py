"""What a figure of the report is made of; each file in `figures/` defines one as `FIGURE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import altair as alt

from .result import MeasuredModel, StoredResult

#: The models of a report, the compared one last.
Models = Sequence[MeasuredModel]


@dataclass(frozen=True)
class Panel:
    """One chart with its title."""

    title: str
    chart: alt.Chart | alt.LayerChart


@dataclass(frozen=True)
class SummaryLine:
    """A number per model in the table at the top of the page.

    Attributes:
        place: lines are sorted by it.
        title: what the number is.
        meaning: one sentence on how to read it.
        metric: the metric it is taken from.
        text_of: the number as text; None if the result has none.
    """

    place: int
    title: str
    meaning: str
    metric: str
    text_of: Callable[[StoredResult], str | None]


@dataclass(frozen=True)
class LayerLine:
    """A number per layer and model in the table of the section with the slider.

    Attributes:
        place: lines are sorted by it.
        title: what the number is.
        metric: the metric it is taken from.
        values_of: one number per layer.
    """

    place: int
    title: str
    metric: str
    values_of: Callable[[StoredResult], list[float | None]]


def no_layer_panels(models: Models) -> list[Panel]:
    """For figures that show nothing of a single layer."""
    return []


@dataclass(frozen=True)
class Figure:
    """One section of the page, and what it adds to the sections that figures share.

    Attributes:
        place: figures are sorted by it.
        title: its heading.
        how: how to read it.
        limits: what it does not say.
        panels: its charts; without any, the figure is left out.
        findings: sentences made from the numbers.
        summary: lines for the table at the top of the page.
        layer_lines: lines for the table of the section with the slider.
        layer_panels: charts for that section; they show the layer of the parameter `layer`.
    """

    place: int
    title: str
    how: str
    limits: str
    panels: Callable[[Models], list[Panel]]
    findings: Callable[[Models], list[str]]
    summary: tuple[SummaryLine, ...] = ()
    layer_lines: tuple[LayerLine, ...] = ()
    layer_panels: Callable[[Models], list[Panel]] = no_layer_panels
