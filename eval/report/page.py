"""HTML page of a report: one file with its data, its charts and the library that draws them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .charts import theme, vega_lite_version
from .drawing import DrawnFigure, page_specs, panel_id
from .health import health_findings
from .layer import layer_numbers, layer_section
from .result import Report
from .summary import summary_rows

_HERE = Path(__file__).parent


def render_page(report: Report, figures: Sequence[DrawnFigure]) -> str:
    """Return the HTML of the page.

    Args:
        report: content of report.json.
        figures: figures of this report.
    """
    models = report.models
    names = [model.name for model in models]
    layer = layer_section(models)
    layer_specs = page_specs([layer])
    data = {
        "specs": {**layer_specs, **page_specs(figures)},
        "layerPanels": list(layer_specs),
        "layerNumbers": layer_numbers(models),
        "models": names,
        "themes": {"light": theme(dark=False), "dark": theme(dark=True)},
    }
    last = max(model.info.num_layers for model in models) - 1
    contents = [*figures, layer]
    return _filled(
        (_HERE / "page.html").read_text(encoding="utf-8"),
        {
            "TITLE": escape(f"Depth report: {' and '.join(names)}"),
            "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
            "LEAD": _lead(report),
            "CONTENTS": "".join(f'<li><a href="#{f.name}">{escape(f.title)}</a></li>' for f in contents),
            "SUMMARY": _summary(report),
            "FIGURES": "\n".join(map(_figure, figures)),
            "LAYER": _figure(layer, before=_slider(last), after='<table id="layer-numbers"></table>'),
            "ABOUT": _about(report),
            # A closing tag inside the data would end the script element.
            "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
            "VEGA": _vega().replace("</script", "<\\/script"),
            "SCRIPT": (_HERE / "page.js").read_text(encoding="utf-8"),
        },
    )


def _vega() -> str:
    """Return the JavaScript library that draws the charts."""
    import vl_convert

    # Its type stubs declare the optional argument as required.
    return vl_convert.javascript_bundle(vl_version=vega_lite_version())  # type: ignore[call-arg]


def _filled(template: str, parts: dict[str, str]) -> str:
    """Replace `@@NAME@@` in the template in a single pass, since inserted text may contain such words."""
    pieces = template.split("@@")
    return "".join(piece if number % 2 == 0 else parts[piece] for number, piece in enumerate(pieces))


def _lead(report: Report) -> str:
    sentences = []
    for model in report.models:
        info, settings = model.info, model.settings
        tokens = settings.num_sequences * settings.sequence_length
        sentences.append(
            f"<b>{escape(model.name)}</b>: {escape(info.class_name)}, {info.num_layers} layers, "
            f"{info.num_parameters / 1e6:,.2f} M parameters; {tokens:,} tokens of "
            f"{escape(report.text.name)} in {settings.num_sequences} windows of "
            f"{settings.sequence_length}, {settings.dtype}."
        )
    return "".join(f"<p>{sentence}</p>" for sentence in [*sentences, *_warnings(report)])


def _warnings(report: Report) -> list[str]:
    models = report.models
    said = [
        f"<b>Non-finite values:</b> {escape(model.name)}: {escape(finding)}"
        for model in models
        for finding in health_findings(model)
    ]
    said += [
        f"<b>Omitted:</b> {escape(model.name)}: {escape(name)} ({escape(reason)})"
        for model in models
        for name, reason in model.failed.items()
    ]
    said += [
        f"<b>Omitted:</b> figure {escape(name)} ({escape(reason)})" for name, reason in report.figures_left_out.items()
    ]
    if len({model.settings.tokens_sha256 for model in models}) > 1:
        said.append(
            "<b>The two models read different tokens</b> (tokenizer or windows differ): their losses per token are "
            "not comparable."
        )
    if len({model.info.num_layers for model in models}) > 1:
        said.append("<b>The two models differ in depth</b>, on which most numbers depend.")
    return said


def _summary(report: Report) -> str:
    names = "".join(f'<th scope="col">{escape(model.name)}</th>' for model in report.models)
    rows = "".join(
        f'<tr><th scope="row">{escape(row.title)}<small>{escape(row.meaning)}</small></th>'
        + "".join(f"<td>{escape(value)}</td>" for value in row.values)
        + "</tr>"
        for row in summary_rows(report.models)
    )
    return f"<table><thead><tr><td></td>{names}</tr></thead><tbody>{rows}</tbody></table>"


def _figure(figure: DrawnFigure, before: str = "", after: str = "") -> str:
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


def _about(report: Report) -> str:
    lines = []
    for model in report.models:
        seconds = sum(cost.seconds for cost in model.costs.values())
        lines += [
            (f"{model.name}, source", model.source),
            *([(f"{model.name}, adapter", model.peft)] if model.peft else []),
            (f"{model.name}, fingerprint", model.settings.fingerprint),
            (f"{model.name}, SHA-256 of the tokens", model.settings.tokens_sha256),
            (f"{model.name}, time", f"{seconds:.1f} s on {model.settings.device}"),
            (f"{model.name}, seeds", ", ".join(f"{k} {v}" for k, v in model.seeds.items()) or "none"),
        ]
    lines += [
        ("text", f"{report.text.name}, SHA-256 {report.text.sha256}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("written", report.created),
    ]
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines)
