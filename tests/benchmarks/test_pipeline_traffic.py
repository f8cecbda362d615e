"""The table and the figure of the traffic of pipelines."""

import pytest

from benchmarks.pipeline_traffic import CASES, PANELS, figure_rows, traffic_table, write_figure


def test_cached_traffic_is_at_most_that_of_the_paper_and_the_embedding():
    with_formula = [case for case in CASES if case.of_paper() is not None]
    assert len(with_formula) == 6
    for case in with_formula:
        cached, whole = (sum(case.boundaries(cross_stage_cache=kept)) for kept in (True, False))
        assert cached <= case.of_paper() + case.num_ranks - 1 < whole


def test_table_has_a_row_per_case():
    rows = traffic_table().splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [case.name for case in CASES]
    # The measurements of a prototype of the design.
    assert rows[0].endswith("| 2 | 2 | 8 | 27 | 20 | 13 |")
    assert rows[8].endswith("| 4 | 2 | 32 | 147 | - | 93 |")


def test_later_passes_carry_the_same():
    for case in PANELS.values():
        cached = [row["units"] for row in figure_rows(case) if row["kind"] == "cross-stage caching"]
        assert len(set(cached[case.num_ranks - 1 :])) == 1


def test_figure_is_drawn(tmp_path):
    pytest.importorskip("vl_convert")
    write_figure(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert all(title in text for title in (*PANELS, "whole state"))
