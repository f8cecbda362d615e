"""The folder of a report: other files in it stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_checkpoints import SIZES

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.cli.main import main


def test_overwriting_a_report_leaves_other_files(run_report):
    assert run_report("stock")[0] == 0
    for name in ("mine.txt", "figures/mine.png", "metrics/mine.json", "metrics/model/notes.txt"):
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_text("x")
    assert run_report("stock", "--batch-size", "2", "--overwrite")[0] == 0
    for name in ("mine.txt", "figures/mine.png", "metrics/mine.json", "metrics/model/notes.txt"):
        assert Path("out", name).read_text() == "x"


@pytest.mark.parametrize("settings", ['{"learning_rate": 1}', "[1]", "{"])
def test_a_folder_with_foreign_settings_is_no_report(run_report, capfd, settings):
    Path("out/metrics/model").mkdir(parents=True)
    Path("out/metrics/model/settings.json").write_text(settings)
    Path("out/report.html").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert main(["report", "stock", "--out", "out", "--text", "text.txt", *SIZES, *more]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1
    assert Path("out/report.html").read_text() == "mine"
    assert Path("out/metrics/model/settings.json").read_text() == settings
