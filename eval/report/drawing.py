"""Draws the figures of a report: their panels on the page, and their PNGs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors.messages import one_line
from ...utils.result_files import write_bytes
from .charts import image_spec, theme, vega_lite_version, with_width
from .figure import Models, Panel
from .figure_registry import FIGURES


@dataclass(frozen=True)
class DrawnFigure:
    """A figure with its charts in one report.

    Attributes:
        name: of its PNG, and of its place on the page.
        title: its heading.
        how: how to read it.
        findings: what it says in this report.
        limits: what it does not say.
        panels: its charts.
    """

    name: str
    title: str
    how: str
    findings: tuple[str, ...]
    limits: str
    panels: tuple[Panel, ...]


def draw_figures(models: Models) -> tuple[list[DrawnFigure], dict[str, str]]:
    """Every figure that the models have results for.

    Returns:
        The figures, and those that cannot be drawn -> why. One of these must not cost the others, nor what has been
        measured.
    """
    drawn = []
    left_out = {}
    for name, figure in FIGURES.items():
        try:
            panels = tuple(figure.panels(models))
            if panels:
                findings = tuple(figure.findings(models))
                drawn.append(DrawnFigure(name, figure.title, figure.how, findings, figure.limits, panels))
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {one_line(error)}"
    return drawn, left_out


def save_images(figures: Sequence[DrawnFigure], folder: Path) -> dict[str, str]:
    """One PNG per figure, its panels side by side on white.

    Returns:
        Figures of which no image could be made -> why.

    Raises:
        OSError: no room, no permission.
    """
    import vl_convert

    folder.mkdir(exist_ok=True)
    remove_images(folder)
    config = {**theme(dark=False), "background": "white", "padding": 12}
    failed: dict[str, str] = {}
    for figure in figures:
        try:
            spec = image_spec(figure.title, [(panel.title, panel.chart) for panel in figure.panels])
            png = vl_convert.vegalite_to_png(spec, vl_version=vega_lite_version(), config=config, scale=2)
        except Exception as error:
            # Whatever the renderer says: the page shows the figure all the same.
            failed[figure.name] = one_line(error)
            continue
        write_bytes(folder / f"{figure.name}.png", png)
    return failed


def remove_images(folder: Path) -> None:
    """Remove the images of another report; other files in the folder stay."""
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)


def page_specs(figures: Sequence[DrawnFigure]) -> dict[str, dict[str, Any]]:
    """Vega-Lite of every panel by the id of its place on the page."""
    return {
        panel_id(figure.name, number): with_width(panel.chart, "container")
        for figure in figures
        for number, panel in enumerate(figure.panels)
    }


def panel_id(figure: str, number: int) -> str:
    """The id of a panel's place on the page."""
    return f"panel-{figure}-{number}"
