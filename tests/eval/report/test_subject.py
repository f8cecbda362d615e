"""Names of the models of a report."""

from __future__ import annotations

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.eval.report.subject import short_names


def test_short_names_tell_models_apart():
    assert short_names(["/a/stories/hf"]) == ["hf"]
    assert short_names(["/a/stories/hf", "/b/other"]) == ["hf", "other"]
    assert short_names(["/a/one/hf", "/a/two/hf"]) == ["one/hf", "two/hf"]
    assert short_names(["x/m", "x/m"]) == ["m (1)", "m (2)"]
    assert short_names(["/x/m", "/x/m"]) == ["m (1)", "m (2)"]
    assert short_names(["/m", "m"]) == ["/m", "m"]


def test_the_current_folder_has_a_name(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    assert short_names(["."]) == ["model"] and short_names([".", "../model/"]) == ["model (1)", "model (2)"]
