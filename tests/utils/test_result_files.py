"""Files of results: strict JSON, complete or not there."""

from __future__ import annotations

import json
import math
import os

import pytest
from full_disk import fill_disk

from hf_depthattn.utils import result_files
from hf_depthattn.utils.result_files import json_text, write_text


def test_json_is_strict_and_can_be_encoded():
    value = {"a": [math.nan, -math.inf, 0.5], "b\ud800": ("x\udfff", "😀", None, True, 3)}
    text = json_text(value)
    assert json.loads(text) == {"a": [None, None, 0.5], "b\ufffd": ["x\ufffd", "😀", None, True, 3]}
    assert text.encode() and text.endswith("}\n")


@pytest.mark.parametrize("room", [0, 100])
def test_a_file_that_finds_no_room_leaves_the_old_one(tmp_path, monkeypatch, room):
    path = tmp_path / "file.json"
    write_text(path, "old")
    fill_disk(monkeypatch, room)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "x" * 1000)
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(result_files.os, "fsync", lambda fd: done.append("fsync") or fsync(fd))
    monkeypatch.setattr(result_files.os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    write_text(tmp_path / "file", "text")
    # The file before its name, the folder after it.
    assert done == ["fsync", "replace", "fsync"]
