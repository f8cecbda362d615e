"""Draw the figures of a report, for the page and as PNGs."""

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
    """A figure with its charts for one report.

    Attributes:
        name: name of the PNG and of the section on the page.
        title: heading.
        how: how to read the figure.
        findings: sentences about the results of this report.
        limits: what the figure does not show.
        panels: charts.
    """

    name: str
    title: str
    how: str
    findings: tuple[str, ...]
    limits: str
    panels: tuple[Panel, ...]


def draw_figures(models: Models) -> tuple[list[DrawnFigure], dict[str, str]]:
    """Draw every figure for which the models have results.

    Returns:
        The figures, and the reasons for those that could not be drawn: an error in one figure must not prevent the
        others or lose measured results.
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
    """Save one PNG per figure, with its panels side by side on a white background.

    Returns:
        The reasons for figures that could not be rendered.

    Raises:
        OSError: if a file cannot be written.
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
            # Whatever the renderer raises: the page still shows the figure.
            failed[figure.name] = one_line(error)
            continue
        write_bytes(folder / f"{figure.name}.png", png)
    return failed


def remove_images(folder: Path) -> None:
    """Remove the images of a previous report; keep other files in the folder."""
    for name in FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)


def page_specs(figures: Sequence[DrawnFigure]) -> dict[str, dict[str, Any]]:
    """Return the Vega-Lite specification of every panel by its element id on the page."""
    return {
        panel_id(figure.name, number): with_width(panel.chart, "container")
        for figure in figures
        for number, panel in enumerate(figure.panels)
    }


def panel_id(figure: str, number: int) -> str:
    """Return the element id of a panel on the page."""
    return f"panel-{figure}-{number}"
