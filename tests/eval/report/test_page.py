"""The page and the images of a report: complete in themselves, every figure explained, both models in the curves."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from report_checkpoints import SIZES, save_both, typed_report

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.cli.main import main
from hf_depthattn.eval.report.charts import PNG_WIDTH
from hf_depthattn.eval.report.drawing import DrawnFigure, draw_figures
from hf_depthattn.eval.report.figure_registry import FIGURES
from hf_depthattn.eval.report.page import render_page


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A full report of two models."""
    folder = tmp_path_factory.mktemp("report")
    model, stock, text = save_both(folder)
    arguments = [model, "--compare", stock, "--text", text, "--out", folder / "out", "--full", "--no-progress"]
    assert main(["report", *map(str, arguments), *SIZES]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def report(out) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(out) -> str:
    return (out / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """What the page draws."""
    text = page.split('<script type="application/json" id="report-data">')[1].split("</script>")[0]
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def figures_of(report: dict) -> list[DrawnFigure]:
    """The figures of a report.json; all of them can be drawn."""
    figures, left_out = draw_figures(typed_report(report).models)
    assert left_out == {}
    return figures


def page_of(report: dict) -> str:
    """The page of a report.json."""
    return render_page(typed_report(report), figures_of(report))


def rows_of(spec: dict) -> list[dict]:
    """All rows of a chart."""
    return spec["data"]["values"]


def test_the_page_loads_nothing(page):
    without_scripts = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    links = re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*("[^"]*"|'[^']*'|[^\s>]*)""", without_scripts)
    assert links and all(link.startswith('"#') or link == '"data:,"' for link in links)
    assert "@import" not in page and not re.findall(r"url\(\s*[\"']?(?:https?:)?//", without_scripts)
    assert not re.findall(r"<script[^>]*\ssrc", page) and not re.findall(r"""\bimport\s*[("']|\bfrom\s*"http""", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    # Data, the library, ours; no closing tag inside any of them.
    assert page.count("</script>") == 3
    assert len(page.encode()) < 3_000_000


def test_every_figure_is_there_with_its_reading_and_limits(page, report, out):
    figures = figures_of(report)
    assert [figure.name for figure in figures] == list(FIGURES)
    for figure in figures:
        section = page.split(f'<section id="{figure.name}">')[1].split("</section>")[0]
        assert section.count('class="chart"') == len(figure.panels) >= 1
        assert '<p class="how">' in section and "<b>Limits.</b>" in section and section.count("<li>") >= 1
        assert all(finding.startswith(("depth: ", "stock: ")) for finding in figure.findings), figure.findings
    for name in ("depth_weights", "slot_mass"):
        assert "not measure importance" in FIGURES[name].limits
    assert {file.stem for file in (out / "figures").iterdir()} == {figure.name for figure in figures}


def test_images_are_large_enough_to_read(out):
    for file in (out / "figures").iterdir():
        start = file.read_bytes()[:24]
        assert start.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", start[16:])
        assert width >= 2 * PNG_WIDTH and height >= 150, file


def test_curves_show_both_models_in_the_same_colours(page):
    specs = data_of(page)["specs"]
    assert {row["model"] for row in rows_of(specs["panel-logit_lens-0"])} == {"depth", "stock"}
    domains = []
    for name, spec in specs.items():
        for layer in spec.get("layer", ()):
            color = layer["encoding"].get("color", {})
            if color.get("field") == "model":
                domains.append((name, color["scale"]["domain"]))
    assert len(domains) > 20 and all(domain == ["depth", "stock"] for _, domain in domains)


def test_heat_map_cells_are_the_measured_weights(page, report):
    weights = report["model"]["metrics"]["depth_weights"]
    cells = {
        (row["line"], row["column"]): row
        for panel in (0, 1)
        for row in rows_of(data_of(page)["specs"][f"panel-depth_weights-{panel}"])
    }
    num_checked = 0
    for site, means in zip(weights["sites"], weights["means"], strict=True):
        known = [mean for mean in means if mean is not None]
        if len(known) < 2:
            assert (site, "emb.") not in cells
            continue
        for source, mean in enumerate(known):
            cell = cells[site, "emb." if source == 0 else str(source)]
            assert cell["mean"] == pytest.approx(mean, rel=1e-4)
            assert cell["value"] == pytest.approx(mean * len(known), rel=1e-4)
            num_checked += 1
    assert num_checked == len(cells)
    domains = [data_of(page)["specs"][f"panel-depth_weights-{i}"]["encoding"]["color"]["scale"] for i in (0, 1)]
    assert domains[0] == domains[1] and domains[0]["domainMid"] == 1


def test_the_slider_has_every_layer(page, report):
    data = data_of(page)
    assert re.search(r'id="layer-slider" min="0" max="2"', page)
    for name in data["layerPanels"]:
        assert {param["name"]: param["value"] for param in data["specs"][name]["params"]} == {"layer": 0}
    effects = report["model"]["metrics"]["causal_scores"]["loss_increase"]
    line = next(line for line in data["layerNumbers"] if line["title"].startswith("loss increase"))
    assert line["values"][0] == pytest.approx(effects, rel=1e-3)
    assert all(len(column) == 3 for line in data["layerNumbers"] for column in line["values"])


def test_the_summary_has_the_numbers_and_their_conditions(page, report):
    summary = page.split('<section id="summary">')[1].split("</section>")[0]
    sublayers = report["model"]["metrics"]["usefulness_sublayer"]
    assert f"{sublayers['score']:.2f} ({sum(sublayers['is_useful'])} of 6)" in summary
    assert f"{report['compare']['metrics']['causal_scores']['mean']:.3f}" in summary
    assert "query / key-value heads" in summary and "4 / 2" in summary
    usefulness = page.split('<section id="usefulness">')[1].split("</section>")[0]
    assert f"fitted on {sublayers['num_fit_tokens']} tokens with {sublayers['num_unknowns']} unknowns" in usefulness
    assert "says little" in usefulness
    causal = page.split('<section id="causal">')[1].split("</section>")[0]
    assert "slots = zero, mix = remix" in causal
    dropped = page.split('<section id="source_drop">')[1].split("</section>")[0]
    controls = report["model"]["metrics"]["source_drop_old"]["control_increases"]
    assert len(controls) == 5 and all(f"{value:+.3f}" in dropped for value in controls)


def test_names_cannot_break_the_page(report, page):
    hostile = json.loads(json.dumps(report))
    hostile["model"]["name"] = 'x</script><img src="y">@@DATA@@'
    broken = page_of(hostile)
    # The library has the word in it.
    assert broken.count("<img") == page.count("<img") and broken.count("</script>") == 3
    assert data_of(broken)["models"][0] == hostile["model"]["name"]


def test_models_of_other_tokens_or_depth_are_not_silently_compared(report):
    other = json.loads(json.dumps(report))
    other["compare"]["settings"]["tokens_sha256"] = "0"
    other["compare"]["info"]["num_layers"] = 4
    page = page_of(other)
    assert "The two models read different tokens" in page and "differ in depth" in page
    assert "read different tokens" not in page_of(report)


def test_a_model_alone_has_no_empty_figures(report):
    alone = {**report, "model": report["compare"], "compare": None}
    names = {figure.name for figure in figures_of(alone)}
    assert names and not names & {"depth_weights", "source_drop", "slot_mass", "slot_drop"}
    assert "<h2>One layer</h2>" in page_of(alone)
