"""Definition of a figure of the report; each file in `figures/` defines one as `FIGURE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import altair as alt

from .result import MeasuredModel, StoredResult

#: The models of a report; the second one, if any, is that of `--compare`.
Models = Sequence[MeasuredModel]


@dataclass(frozen=True)
class Panel:
    """One chart with its title."""

    title: str
    chart: alt.Chart | alt.LayerChart


@dataclass(frozen=True)
class SummaryLine:
    """One number per model in the table at the top of the page.

    Attributes:
        place: sort key.
        title: name of the number.
        meaning: one sentence on how to read it.
        metric: metric that it is taken from.
        text_of: function from a result to the number as text, or None if the result does not have it.
    """

    place: int
    title: str
    meaning: str
    metric: str
    text_of: Callable[[StoredResult], str | None]


@dataclass(frozen=True)
class LayerLine:
    """One number per layer and model in the table of the section "One layer".

    Attributes:
        place: sort key.
        title: name of the number.
        metric: metric that it is taken from.
        values_of: function from a result to one number per layer.
    """

    place: int
    title: str
    metric: str
    values_of: Callable[[StoredResult], list[float | None]]


def no_layer_panels(models: Models) -> list[Panel]:
    """Return no panels, for figures without panels of a single layer."""
    return []


@dataclass(frozen=True)
class Figure:
    """One section of the page, and its contributions to the sections that figures share.

    Attributes:
        place: sort key.
        title: heading.
        how: how to read the figure.
        limits: what the figure does not show.
        panels: function from the models to charts; a figure without charts is omitted.
        findings: function from the models to sentences about their results.
        summary: lines for the table at the top of the page.
        layer_lines: lines for the table of the section "One layer".
        layer_panels: function from the models to charts for that section, which show the layer of the chart parameter
            `layer`.
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
