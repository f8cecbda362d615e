"""Altair charts of a report: curves, heat maps, bars, and drops with their controls.

Rows are dictionaries of plain values. Charts have no width and no colours: the page sets the width, and `theme` the
colours, so that the page can switch between light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import altair as alt

#: Dictionaries of plain values; each chart documents the fields it needs.
Rows = list[dict[str, Any]]

_Concat = TypeVar("_Concat", alt.HConcatChart, alt.VConcatChart)

#: Width of a panel in the PNGs; on the page, panels have the width of their column.
PNG_WIDTH = 380
_ROW_HEIGHT, _LEAST_HEIGHT, _LARGEST_HEIGHT, _CURVE_HEIGHT = 17, 130, 620, 210
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', 'DejaVu Sans', sans-serif"


def theme(*, dark: bool) -> dict[str, Any]:
    """Return Vega-Lite's `config` for a light or a dark page."""
    ink, faint, line = ("#e4e7ec", "#aab2bf", "#3a4250") if dark else ("#1c2430", "#4d5968", "#d9dee5")
    # The middle of the diverging colours is close to the background.
    middle = "#2b313c" if dark else "#f1f1ee"
    ends = (
        (["#5aa9ff", "#31648f"], ["#a5602f", "#ffa24d"]) if dark else (["#1f5fa8", "#8db8e0"], ["#efb07a", "#b9520c"])
    )
    return {
        "font": _FONT,
        "background": None,
        "view": {"stroke": None},
        "axis": {
            "labelColor": faint,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "gridColor": line,
            "domainColor": line,
            "tickColor": line,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelLimit": 110,
        },
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            # One below the other, since model names may be long.
            "layout": {"top": {"direction": "vertical", "anchor": "start"}},
        },
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start"},
        "rule": {"color": faint},
        "text": {"color": ink},
        "range": {
            "category": ["#6cb2ff", "#ffa24d"] if dark else ["#1f5fa8", "#c45a0b"],
            "diverging": [*ends[0], middle, *ends[1]],
            "heatmap": {"scheme": "viridis"},
        },
    }


def curve(
    rows: Rows,
    *,
    x: str,
    y: str,
    models: Sequence[str],
    log: bool = False,
    zero: bool = False,
    rule: tuple[float, str] | None = None,
) -> alt.LayerChart:
    """Draw one line per model and kind.

    Args:
        rows: with fields `at` (number on the axis), `where` (its name), `value`, `model` and `kind` (`""` if there is
            only one kind).
        x, y: titles of the axes.
        models: all models of the report, so that each has the same colour in all charts.
        log: use a logarithmic axis; rows without a positive value are dropped.
        zero: start the axis at 0.
        rule: a horizontal line and what it stands for.
    """
    rows = [row for row in rows if row["value"] is not None and not (log and row["value"] <= 0)]
    shown, kinds = _unique(rows, "model"), _unique(rows, "kind")
    scale = alt.Scale(type="log", nice=False, padding=8) if log else alt.Scale(zero=zero)
    tooltip = [_text("where", x), alt.Tooltip("value:Q", title=_short(y), format=".4g"), _text("model", "model")]
    if len(kinds) > 1:
        tooltip.append(_text("kind", "kind"))
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("at:Q", title=x, axis=alt.Axis(tickMinStep=1, grid=False, format="d")),
        y=alt.Y("value:Q", title=y, scale=scale, axis=alt.Axis(tickCount=5, grid=not log)),
        color=alt.Color(
            "model:N", title=None, scale=alt.Scale(domain=list(models)), legend=_legend(len(models) > 1, shown)
        ),
        tooltip=tooltip,
    )
    line = base.mark_line(strokeWidth=2)
    if len(kinds) > 1:
        dashes = alt.Scale(domain=kinds, range=[[1, 0], [5, 3], [1, 3]])
        line = line.encode(strokeDash=alt.StrokeDash("kind:N", title=None, scale=dashes, legend=_legend(True)))
    points = base.mark_point(filled=True, size=45, opacity=1)
    layers = [line, points] if rule is None else [_rule(rule), line, points]
    return alt.LayerChart(layer=layers, height=_CURVE_HEIGHT)


def heat_map(
    rows: Rows,
    *,
    x: str,
    y: str,
    value: str,
    columns: Sequence[str],
    lines: Sequence[str],
    domain: tuple[float, float],
    middle: float | None = None,
    more: Sequence[tuple[str, str]] = (),
    by_layer: bool = False,
) -> alt.Chart:
    """Draw one cell per row on one colour scale.

    Args:
        rows: with fields `column`, `line` and `value`.
        x, y, value: titles of the axes and of the colour scale.
        columns, lines: names on the axes, in order.
        domain: range of the colour scale; values outside are clamped.
        middle: neutral value, shown in a pale colour.
        more: further numeric fields for the tooltip, with titles.
        by_layer: only show the rows whose field `layer` equals the chart parameter `layer`.
    """
    rows = [row for row in rows if row["value"] is not None]
    scale = alt.Scale(
        domain=list(domain),
        clamp=True,
        # The default interpolates around the colour wheel, through unrelated hues.
        interpolate="lab",
        domainMid=alt.Undefined if middle is None else middle,
    )
    return (
        _base(rows, by_layer)
        .mark_rect()
        .encode(
            x=alt.X("column:N", title=x, sort=list(columns), scale=alt.Scale(domain=list(columns)), axis=_band_axis()),
            y=alt.Y("line:N", title=y, sort=list(lines), scale=alt.Scale(domain=list(lines)), axis=_band_axis()),
            color=alt.Color(
                "value:Q",
                title=value,
                scale=scale,
                legend=alt.Legend(
                    orient="top", direction="horizontal", gradientLength=170, titleLimit=320, format=".3~g"
                ),
            ),
            tooltip=[
                _text("line", y),
                _text("column", x),
                alt.Tooltip("value:Q", title=value, format=".4g"),
                *(alt.Tooltip(f"{name}:Q", title=title, format=".4g") for name, title in more),
            ],
        )
        .properties(height=_height(len(lines)))
    )


def bars(
    rows: Rows,
    *,
    x: str,
    y: str,
    columns: Sequence[str],
    rule: tuple[float, str] | None = None,
    controls: str | None = None,
    limit: float | None = None,
    kinds: Sequence[str] = (),
    by_layer: bool = False,
) -> alt.LayerChart:
    """Draw one bar per column and kind.

    Args:
        rows: with fields `column`, `value`, `kind`, and `control` if `controls` is given.
        x, y: titles of the axes.
        columns: names on the axis, in order.
        rule: a horizontal line and what it stands for.
        controls: title of the ticks across the bars, whose values are in `control`.
        limit: fixed upper end of the axis, so that bars of different layers are comparable.
        kinds: all kinds that have a colour, including those without rows.
        by_layer: as in `heat_map`.
    """
    rows = [row for row in rows if row["value"] is not None]
    kinds, shown = list(kinds) or _unique(rows, "kind"), _unique(rows, "kind")
    tooltip = [_text("column", x), alt.Tooltip("value:Q", title=_short(y), format=".4g")]
    if len(kinds) > 1:
        tooltip.append(_text("kind", "kind"))
    if controls is not None:
        tooltip.append(alt.Tooltip("control:Q", title=controls, format=".4g"))
    # Set explicitly, since the chart of a single layer may have no bars.
    scale = alt.Scale() if limit is None else alt.Scale(domain=[min(0.0, *(row["value"] for row in rows)), limit])
    base = _base(rows, by_layer).encode(
        x=alt.X("column:N", title=x, sort=list(columns), scale=alt.Scale(domain=list(columns)), axis=_band_axis()),
        tooltip=tooltip,
    )
    if len(shown) > 1:
        base = base.encode(xOffset=alt.XOffset("kind:N", sort=shown))
    color = alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds), legend=_legend(len(kinds) > 1, shown))
    y_axis = alt.Y("value:Q", title=y, stack=None, scale=scale, axis=alt.Axis(tickCount=5))
    layers = [base.mark_bar().encode(y=y_axis, color=color)]
    if controls is not None:
        layers.append(base.mark_tick(thickness=2, color="#888").encode(y=alt.Y("control:Q", title=y)))
    if rule is not None:
        layers.append(_rule(rule))
    return alt.LayerChart(layer=layers, height=_CURVE_HEIGHT)


def drop_beside_controls(rows: Rows, *, x: str) -> alt.Chart:
    """Draw measured values and their random controls as points, on one line per model.

    Args:
        rows: with fields `value`, `line`, and `kind` (`"measured"` or `"random control"`).
        x: title of the axis.
    """
    kinds, lines = ["measured", "random control"], _unique(rows, "line")
    # The name of a single model is in the title; on a phone the label would take half of the width.
    axis = alt.Axis(labelLimit=150, grid=True) if len(lines) > 1 else None
    return (
        alt.Chart(_data(rows))
        .mark_point(filled=True, size=110, opacity=0.85)
        .encode(
            x=alt.X("value:Q", title=x, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=5)),
            y=alt.Y("line:N", title=None, sort=lines, axis=axis),
            color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds), legend=_legend(True)),
            shape=alt.Shape("kind:N", title=None, scale=alt.Scale(domain=kinds), legend=_legend(True)),
            tooltip=[
                _text("line", "dropped in"),
                _text("kind", "what"),
                alt.Tooltip("value:Q", title=x, format="+.4g"),
            ],
        )
        .properties(height=46 * len(lines) + 30)
    )


def with_width(chart: alt.Chart | alt.LayerChart, width: float | str) -> dict[str, Any]:
    """Return the chart as Vega-Lite, with a width in pixels or `"container"`."""
    # Altair's limit of 5000 rows is meant for notebooks.
    with alt.data_transformers.enable("default", max_rows=None):
        return chart.properties(width=width).to_dict()


def image_spec(title: str, panels: Sequence[tuple[str, alt.Chart | alt.LayerChart]]) -> dict[str, Any]:
    """Return charts with their titles as one Vega-Lite image, two per row."""
    charts = [chart.properties(width=PNG_WIDTH, title=name) for name, chart in panels]
    rows = [_apart(alt.HConcatChart(hconcat=charts[i : i + 2])) for i in range(0, len(charts), 2)]
    image = _apart(alt.VConcatChart(vconcat=rows))
    with alt.data_transformers.enable("default", max_rows=None):
        return image.properties(title=alt.Title(title, fontSize=16, offset=14)).to_dict()


def _apart(chart: _Concat) -> _Concat:
    """Give every panel its own scales and legends."""
    return chart.resolve_scale(
        color="independent", shape="independent", strokeDash="independent", xOffset="independent"
    )


def vega_lite_version() -> str:
    """Return the Vega-Lite version of Altair's charts, e.g. `v6.1`."""
    return ".".join(alt.SCHEMA_VERSION.split(".")[:2])


def _base(rows: Rows, by_layer: bool) -> alt.Chart:
    chart = alt.Chart(_data(rows))
    return (
        chart.add_params(alt.param(name="layer", value=0)).transform_filter("datum.layer == layer")
        if by_layer
        else chart
    )


def _data(rows: Rows) -> alt.Data:
    # The page needs no more digits than a tooltip shows; report.json has all of them.
    short = [{key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    return alt.Data(values=short)


def _rule(rule: tuple[float, str]) -> alt.Chart:
    height, meaning = rule
    return (
        alt.Chart(alt.Data(values=[{"height": height, "meaning": meaning}]))
        .mark_rule(strokeDash=[4, 3], strokeWidth=1.5)
        .encode(y="height:Q", tooltip=[_text("meaning", "line")])
    )


def _text(field: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:N", title=title)


def _legend(wanted: bool, values: Sequence[str] = ()) -> alt.Legend | None:
    if not wanted:
        return None
    return alt.Legend(orient="top", labelLimit=220, values=list(values) if values else alt.Undefined)


def _band_axis() -> alt.Axis:
    return alt.Axis(labelOverlap=True, labelAngle=0, grid=False)


def _short(title: str) -> str:
    return title.split(" (")[0]


def _height(num_lines: int) -> int:
    return min(max(num_lines * _ROW_HEIGHT, _LEAST_HEIGHT), _LARGEST_HEIGHT)


def _unique(rows: Rows, field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))
