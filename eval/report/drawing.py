"""The figures of a report, in the order of the page, and their PNGs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors.messages import one_line
from ...utils.result_files import write_bytes
from . import findings, panels, panels_depth
from .charts import PNG_WIDTH, theme, vega_lite_version, with_width
from .panels import Panel, Parts

_TEXTS = Path(__file__).with_name("texts.json")

#: Name -> panels from the measured parts, and what they say in this report. Without panels a figure is left out.
_FIGURES: dict[str, tuple[Callable[[Parts], list[Panel]], Callable[[Parts], list[str]]]] = {
    "depth_weights": (panels_depth.depth_weights, findings.depth_weights),
    "source_drop": (panels_depth.source_drop, findings.source_drop),
    "source_drop_matrix": (panels_depth.source_drop_matrix, findings.source_drop_matrix),
    "depth_weight_sites": (panels_depth.depth_weight_sites, findings.depth_weight_sites),
    "slot_mass": (panels_depth.slot_mass, findings.slot_mass),
    "slot_drop": (panels_depth.slot_drop, findings.slot_drop),
    "usefulness": (panels.usefulness, findings.usefulness),
    "causal": (panels.causal, findings.causal),
    "permutation": (panels.permutation, findings.permutation),
    "logit_lens": (panels.logit_lens, findings.logit_lens),
    "contribution": (panels.contribution, findings.contribution),
    "magnitude": (panels.magnitude, findings.magnitude),
    "similarity": (panels.similarity, findings.similarity),
    "gradient": (panels.gradient, findings.gradient),
    "jacobian": (panels.jacobian, findings.jacobian),
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of its PNG.
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


def parts_of(report: dict[str, Any]) -> Parts:
    """The measured models of a report, the compared one last."""
    return [part for part in (report["model"], report["compare"]) if part is not None]


def build_figures(report: dict[str, Any]) -> list[Figure]:
    """Every figure that the report has results for.

    One that cannot be drawn is left out and noted in the report under `figures_left_out`: it must not cost the others,
    nor what has been measured.
    """
    texts = json.loads(_TEXTS.read_text(encoding="utf-8"))
    parts = parts_of(report)
    figures = []
    left_out: dict[str, str] = report.setdefault("figures_left_out", {})
    for name, (panels_of, findings_of) in _FIGURES.items():
        try:
            panels = panels_of(parts)
            if panels:
                findings = tuple(findings_of(parts))
                figures.append(Figure(name=name, findings=findings, panels=tuple(panels), **texts[name]))
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {one_line(error)}"
    return figures


def save_images(figures: list[Figure], folder: Path) -> dict[str, str]:
    """One PNG per figure, its panels side by side on white.

    Returns:
        Figures of which no image could be made -> why.

    Raises:
        OSError: no room, no permission.
    """
    import altair as alt
    import vl_convert

    folder.mkdir(exist_ok=True)
    remove_images(folder)
    config = {**theme(dark=False), "background": "white", "padding": 12}
    failed: dict[str, str] = {}
    for figure in figures:
        charts = [panel.chart.properties(width=PNG_WIDTH, title=panel.title) for panel in figure.panels]
        rows = [_apart(alt.hconcat(*charts[i : i + 2])) for i in range(0, len(charts), 2)]
        image = _apart(alt.vconcat(*rows))
        try:
            with alt.data_transformers.enable("default", max_rows=None):
                spec = image.properties(title=alt.Title(figure.title, fontSize=16, offset=14)).to_dict()
            png = vl_convert.vegalite_to_png(spec, vl_version=vega_lite_version(), config=config, scale=2)
        except Exception as error:
            # Whatever the renderer says: the page shows the figure all the same.
            failed[figure.name] = one_line(error)
            continue
        write_bytes(folder / f"{figure.name}.png", png)
    return failed


def remove_images(folder: Path) -> None:
    """Remove the images of another report; other files in the folder stay."""
    for name in _FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)


def _apart(chart):
    """Every panel keeps its own scales and legends."""
    return chart.resolve_scale(
        color="independent", shape="independent", strokeDash="independent", xOffset="independent"
    )


def page_specs(figures: list[Figure]) -> dict[str, dict[str, Any]]:
    """Vega-Lite of every panel by the id of its place on the page."""
    return {
        panel_id(figure.name, number): with_width(panel.chart, "container")
        for figure in figures
        for number, panel in enumerate(figure.panels)
    }


def panel_id(figure: str, number: int) -> str:
    """The id of a panel's place on the page."""
    return f"panel-{figure}-{number}"
