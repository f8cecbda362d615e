"""The images of a report."""

from __future__ import annotations

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from hf_depthattn.eval.report import drawing


def test_images_of_others_stay(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("mine.png", "causal.png", "notes.txt"):
        (folder / name).write_text("x")
    drawing.save_images([], folder)
    assert sorted(file.name for file in folder.iterdir()) == ["mine.png", "notes.txt"]
