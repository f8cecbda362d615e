"""A metric and its figure are two files and a row: each row has its files, and nothing else names them."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from report_checkpoints import SIZES, save_both
from repository import ROOT

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.eval.metrics.registry import ROWS
from hf_depthattn.eval.report.figure_registry import FIGURES

METRICS, FIGURE_FILES = ROOT / "eval" / "metrics", ROOT / "eval" / "report" / "figures"
REGISTRY = METRICS / "registry.py"
#: Names of metrics in other files: health says from which layer on a model has NaN, whatever the figures show.
NAMED_ELSEWHERE = {"report/health.py": {"logit_lens", "output_magnitude"}}

#: The command without the images, which take longest.
WITHOUT_IMAGES = """
import sys
from hf_depthattn.cli.main import main
from hf_depthattn.eval.report import drawing

drawing.save_images = lambda figures, folder: {}
sys.exit(main(sys.argv[1:]))
"""
#: A metric and a figure as somebody would add them.
NEW_METRIC = """
from dataclasses import dataclass
import torch
from .probing.results import DepthMetric, MetricResult, depth_metric

@dataclass(frozen=True, eq=False, kw_only=True)
class StateMaximum(MetricResult):
    states: torch.Tensor

@depth_metric
def state_maximum(probe, text):
    found = torch.zeros(probe.num_layers + 1, dtype=torch.float64)
    def see(index, state):
        found[index] = max(found[index], state.abs().max())
    with probe.observe_states(see):
        for ids in text:
            probe.logits(ids)
    return StateMaximum(states=found)

METRICS = {"state_maximum": DepthMetric(state_maximum, lambda probe: 1.0, True)}
"""
NEW_FIGURE = """
from ..figure import Figure, LayerLine, SummaryLine
from ..rows import curve_panels, found, per_layer

def panels(models):
    return curve_panels(models, "Largest entries", per_layer(models, "state_maximum", "states"), "largest entry")

def findings(models):
    return [f"{name}: the last state goes up to {r['states'][-1]:.2f}." for name, r in found(models, "state_maximum")]

FIGURE = Figure(
    place=125, title="How far states go", how="The largest entry.", limits="One entry.", panels=panels,
    findings=findings,
    summary=(SummaryLine(75, "last maximum", "An entry.", "state_maximum", lambda r: f"{r['states'][-1]:.2f}"),),
    layer_lines=(LayerLine(75, "largest entry", "state_maximum", lambda r: r["states"][:-1]),),
)
"""


def strings_of(file: Path) -> set[str]:
    """The string constants of a file."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.metric)
def test_a_row_has_its_files(row):
    assert (METRICS / f"{row.module}.py").is_file()
    assert row.metric in import_module(f"hf_depthattn.eval.metrics.{row.module}").METRICS
    for figure in row.figures:
        assert row.metric in strings_of(FIGURE_FILES / f"{figure}.py")


def test_every_metric_has_one_row():
    files = [file for file in METRICS.glob("*.py") if re.search(r"^METRICS\b", file.read_text(), re.M)]
    modules = [import_module(f"hf_depthattn.eval.metrics.{file.stem}") for file in files]
    defined = Counter(name for module in modules for name in module.METRICS)
    assert defined == Counter(row.metric for row in ROWS)


def test_every_figure_has_one_row():
    files = {file.stem for file in FIGURE_FILES.glob("*.py")} - {"__init__"}
    assert Counter(files) == Counter(figure for row in ROWS for figure in row.figures)


def test_every_metric_is_shown():
    shown = set().union(*(strings_of(FIGURE_FILES / f"{figure}.py") for row in ROWS for figure in row.figures))
    assert {row.metric for row in ROWS} - shown == set()


def test_nothing_else_names_a_metric_or_a_figure():
    names = {row.metric for row in ROWS} | {figure for row in ROWS for figure in row.figures}
    modules = {METRICS / f"{row.module}.py" for row in ROWS}
    found = {}
    for file in (ROOT / "eval").rglob("*.py"):
        if file not in {REGISTRY, *modules} and file.parent != FIGURE_FILES and names & strings_of(file):
            found[file.relative_to(ROOT / "eval").as_posix()] = names & strings_of(file)
    assert found == NAMED_ELSEWHERE
    for file in (ROOT / "eval" / "report").glob("page.[!p]*"):
        assert not names & set(re.findall(r"\w+", file.read_text(encoding="utf-8"))), file.name


def test_places_are_unique():
    for places in (
        [figure.place for figure in FIGURES.values()],
        [line.place for figure in FIGURES.values() for line in figure.summary],
        [line.place for figure in FIGURES.values() for line in figure.layer_lines],
    ):
        assert len(set(places)) == len(places)


@pytest.mark.slow
def test_two_files_and_a_row_are_all_that_a_new_metric_takes(tmp_path):
    for folder in ("hf_depthattn", "kernels", "conversion", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "tasks"))
    metrics = tmp_path / "eval" / "metrics"
    (metrics / "state_maximum.py").write_text(NEW_METRIC)
    (tmp_path / "eval" / "report" / "figures" / "state_maximum.py").write_text(NEW_FIGURE)
    before = '    Row("output_variance", "output_variance"),\n'
    registry = (metrics / "registry.py").read_text(encoding="utf-8")
    assert before in registry
    row = '    Row("state_maximum", "state_maximum", ("state_maximum",)),\n'
    (metrics / "registry.py").write_text(registry.replace(before, before + row), encoding="utf-8")

    _, stock, text = save_both(tmp_path)
    arguments = ["report", str(stock), "--text", str(text), *SIZES, "--out", "out", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMAGES, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    last = content["model"]["metrics"]["state_maximum"]["states"][-1]
    assert json.loads(result.stdout)["summary"]["last maximum"] == {"stock": f"{last:.2f}"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    section = page.split('<section id="state_maximum">')[1].split("</section>")[0]
    assert f"stock: the last state goes up to {last:.2f}." in section and '"title":"largest entry"' in page
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections.index("magnitude") + 1 == sections.index("state_maximum") == sections.index("similarity") - 1
