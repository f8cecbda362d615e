"""The page and the part of the README are made from the results."""

from __future__ import annotations

import pytest
from pretraining_study import made_up_result
from repository import ROOT

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.figure import curve_rows, write_plot
from benchmarks.pretraining.group import groups
from benchmarks.pretraining.page import page, plot_name, rates_part, readme_part
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.results import RESULTS, read_results


@pytest.fixture(scope="module")
def results():
    study, found = Study("stdlib", 1000, ("prenorm", "moda"), num_seeds=2), {}
    while missing := Plan(study, {run: result.loss for run, result in found.items()}).missing():
        found[missing[0]] = made_up_result(missing[0], 2.0 + missing[0].seed + (missing[0].learning_rate != 4e-3))
    return found


def test_the_page_has_every_arm_and_the_protocol(results):
    text = page(results, {}, {})
    assert "| PreNorm | 1,000 | 0.004 | 2.500 | 2 |" in text
    assert f"- {len(results)} runs, " in text
    assert plot_name(groups(results)[0]) in text


def test_the_readme_has_the_table_and_a_link(results):
    text = readme_part(results, {})
    assert "| MoDA | " in text and "docs/evidence.md" in text
    assert f"](docs/{plot_name(groups(results)[0])})" in text
    assert readme_part({}, {}) == rates_part({}, {}) == ""


def test_the_tutorial_has_the_best_rates(results):
    assert "| MoDA | 0.004 | 2.000 | 2.000 |" in rates_part(results, {})


def test_the_plot_shows_the_late_part_of_every_arm(results, tmp_path):
    pytest.importorskip("vl_convert", reason="vl-convert is not installed")
    (group,) = groups(results)
    rows = curve_rows(group)
    assert {row["arm"] for row in rows} == {"PreNorm", "MoDA"}
    assert [row["bytes"] for row in rows if row["arm"] == "MoDA"] == [0.0005, 0.00075, 0.001]
    write_plot(group, tmp_path / "plot.svg")
    assert all(label in (tmp_path / "plot.svg").read_text() for label in ("PreNorm", "MoDA", "CPU seconds"))


def test_committed_results_are_small_can_be_compared_and_have_their_plots():
    found = read_results()
    assert all(path.stat().st_size < 20_000 for path in RESULTS.rglob("*.json"))
    for run, result in found.items():
        assert (RESULTS / f"{run.path}.json").is_file()
        assert result.fields == dict(ARMS[run.arm].fields)
        assert len(result.heldout_curve) <= 60
    assert all((ROOT / "docs" / plot_name(group)).is_file() for group in groups(found))
