"""Sources of text: files and named documents, in their order; errors name the flag."""

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.sources import read_sources


def test_sources_are_joined_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("text of a file")
    path = str(tmp_path / "a.txt")
    named = {"own": ["one", "two"]}
    assert read_sources(["own", path], "--text", named=named) == ["one", "two", "text of a file"]
    assert read_sources([path, "own"], "--text", named=named) == ["text of a file", "one", "two"]
    assert named == {"own": ["one", "two"]}


def test_errors_name_the_flag(tmp_path):
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(UserError, match=r"--text .*empty.txt: contains no text"):
        read_sources([str(tmp_path / "empty.txt")], "--text", named={})
