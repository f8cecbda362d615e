"""The page of a report: one HTML file with its data, its charts and the library that draws them."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from .charts import theme, vega_lite_version, with_width
from .drawing import Figure, page_specs, panel_id, parts_of
from .health import health_findings
from .layer import layer_numbers, layer_panels
from .summary import summary_rows

_HERE = Path(__file__).parent
_LAYER = "layer"


def render_page(report: dict[str, Any], figures: list[Figure]) -> str:
    """The whole page as text.

    Args:
        report: the content of report.json.
        figures: of this report.
    """
    import vl_convert

    parts = parts_of(report)
    texts = json.loads((_HERE / "texts.json").read_text(encoding="utf-8"))
    panels = layer_panels(parts)
    layer_specs = {
        panel_id(_LAYER, number): with_width(panel.chart, "container") for number, panel in enumerate(panels)
    }
    data = {
        "specs": {**layer_specs, **page_specs(figures)},
        "layerPanels": list(layer_specs),
        "layerNumbers": layer_numbers(parts),
        "models": [part["name"] for part in parts],
        "themes": {"light": theme(dark=False), "dark": theme(dark=True)},
    }
    last = max(part["info"]["num_layers"] for part in parts) - 1
    layer = Figure(name=_LAYER, findings=(), panels=tuple(panels), **texts[_LAYER])
    contents = [*figures, layer]
    return _filled(
        (_HERE / "page.html").read_text(encoding="utf-8"),
        {
            "TITLE": escape(f"Depth report: {' and '.join(data['models'])}"),
            "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
            "LEAD": _lead(report),
            "CONTENTS": "".join(f'<li><a href="#{f.name}">{escape(f.title)}</a></li>' for f in contents),
            "SUMMARY": _summary(report),
            "FIGURES": "\n".join(map(_figure, figures)),
            "LAYER": _figure(layer, before=_slider(last), after='<table id="layer-numbers"></table>'),
            "ABOUT": _about(report),
            # A tag inside the data could end it.
            "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
            "VEGA": vl_convert.javascript_bundle(vl_version=vega_lite_version()).replace("</script", "<\\/script"),
            "SCRIPT": (_HERE / "page.js").read_text(encoding="utf-8"),
        },
    )


def _filled(template: str, parts: dict[str, str]) -> str:
    """The template with `@@NAME@@` replaced, in one pass: what is filled in may contain such words."""
    pieces = template.split("@@")
    return "".join(piece if number % 2 == 0 else parts[piece] for number, piece in enumerate(pieces))


def _lead(report: dict[str, Any]) -> str:
    sentences = []
    for part in parts_of(report):
        info, settings = part["info"], part["settings"]
        tokens = settings["num_sequences"] * settings["sequence_length"]
        sentences.append(
            f"<b>{escape(part['name'])}</b>: {escape(info['class'])}, {info['num_layers']} layers, "
            f"{info['num_parameters'] / 1e6:,.2f} M parameters; {tokens:,} tokens of "
            f"{escape(report['text']['name'])} in {settings['num_sequences']} windows of "
            f"{settings['sequence_length']}, {settings['dtype']}."
        )
    return "".join(f"<p>{sentence}</p>" for sentence in [*sentences, *_warnings(report)])


def _warnings(report: dict[str, Any]) -> list[str]:
    parts = parts_of(report)
    said = [
        f"<b>No finite numbers:</b> {escape(part['name'])}: {escape(finding)}"
        for part in parts
        for finding in health_findings(part)
    ]
    said += [
        f"<b>Left out:</b> {escape(part['name'])}: {escape(name)} ({escape(reason)})"
        for part in parts
        for name, reason in part["failed"].items()
    ]
    said += [
        f"<b>Left out:</b> figure {escape(name)} ({escape(reason)})"
        for name, reason in report.get("figures_left_out", {}).items()
    ]
    if len({part["settings"]["tokens_sha256"] for part in parts}) > 1:
        said.append(
            "<b>The two models read different tokens</b> of the text (another tokenizer or window): losses per token "
            "cannot be compared between them."
        )
    if len({part["info"]["num_layers"] for part in parts}) > 1:
        said.append("<b>The two models differ in depth</b>: most numbers depend on it.")
    return said


def _summary(report: dict[str, Any]) -> str:
    names = "".join(f'<th scope="col">{escape(part["name"])}</th>' for part in parts_of(report))
    rows = "".join(
        f'<tr><th scope="row">{escape(row.title)}<small>{escape(row.meaning)}</small></th>'
        + "".join(f"<td>{escape(value)}</td>" for value in row.values)
        + "</tr>"
        for row in summary_rows(report)
    )
    return f"<table><thead><tr><td></td>{names}</tr></thead><tbody>{rows}</tbody></table>"


def _figure(figure: Figure, before: str = "", after: str = "") -> str:
    panels = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>"
        f'<div class="chart" id="{panel_id(figure.name, number)}" role="img" '
        f'aria-label="{escape(panel.title)}"></div></figure>'
        for number, panel in enumerate(figure.panels)
    )
    findings = "".join(f"<li>{escape(finding)}</li>" for finding in figure.findings)
    return (
        f'<section id="{figure.name}"><h2>{escape(figure.title)}</h2><p class="how">{escape(figure.how)}</p>'
        + (f'<ul class="findings">{findings}</ul>' if findings else "")
        + f'{before}<div class="panels">{panels}</div>{after}'
        + f'<p class="limits"><b>Limits.</b> {escape(figure.limits)}</p></section>'
    )


def _slider(last: int) -> str:
    return (
        f'<div class="slider"><label for="layer-slider">Layer <output id="layer-shown">{last // 2}</output></label>'
        f'<input type="range" id="layer-slider" min="0" max="{last}" value="{last // 2}" step="1"></div>'
    )


def _about(report: dict[str, Any]) -> str:
    lines = []
    for part in parts_of(report):
        seconds = sum(cost["seconds"] for cost in part["costs"].values())
        lines += [
            (f"{part['name']}, source", part["source"]),
            *([(f"{part['name']}, adapter", part["peft"])] if part.get("peft") else []),
            (f"{part['name']}, fingerprint", part["settings"]["fingerprint"]),
            (f"{part['name']}, SHA-256 of its tokens", part["settings"]["tokens_sha256"]),
            (f"{part['name']}, measured in", f"{seconds:.1f} s on {part['settings']['device']}"),
            (f"{part['name']}, seeds", ", ".join(f"{k} {v}" for k, v in part["seeds"].items()) or "none needed"),
        ]
    lines += [
        ("text", f"{report['text']['name']}, SHA-256 {report['text']['sha256']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("written", report["created"]),
    ]
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in lines)
