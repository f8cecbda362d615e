"""`run_folder`: results of other settings and other people's files are refused, a run's own files are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.eval.run_folder import RunFolder, RunLayout

LAYOUT = RunLayout(
    content="run",
    settings_file="settings.json",
    required_settings=frozenset({"model"}),
    own_files=("*/settings.json", "*/about.json", "*/result_*.json"),
    without_results=("about.json",),
)
FIRST, SECOND = {"first": {"model": "a", "seed": 0}}, {"second": {"model": "b"}}


def open_folder(path: Path, settings=FIRST, overwrite: bool = False) -> RunFolder:
    return RunFolder(path, LAYOUT, settings, overwrite=overwrite)


def test_the_same_settings_continue(tmp_path):
    open_folder(tmp_path / "run").write("first/result_1.json", {"value": 1})
    folder = open_folder(tmp_path / "run")
    assert folder.read("first/result_1.json") == {"value": 1} and folder.read("first/result_2.json") is None
    assert json.loads((tmp_path / "run" / "first" / "settings.json").read_text()) == FIRST["first"]


def test_other_settings_are_refused_by_their_name(tmp_path):
    open_folder(tmp_path, FIRST | SECOND).write("second/result_1.json", {})
    message = r"holds a run whose second has model b, not c; choose another folder \(--out\), or --overwrite"
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path, FIRST | {"second": {"model": "c"}})
    # A setting that is only in one of them differs too.
    with pytest.raises(UserError, match="whose second has dtype None, not float32"):
        open_folder(tmp_path, FIRST | {"second": {"model": "b", "dtype": "float32"}})
    # Without the second part, as with it.
    assert open_folder(tmp_path, FIRST).read("second/result_1.json") == {}


def test_a_folder_of_one_part_names_no_part(tmp_path):
    RunFolder(tmp_path, LAYOUT, {".": {"model": "a"}}, overwrite=False).write("result_1.json", {})
    with pytest.raises(UserError, match="holds a run with model a, not b"):
        RunFolder(tmp_path, LAYOUT, {".": {"model": "b"}}, overwrite=False)


def test_settings_without_results_are_replaced(tmp_path):
    open_folder(tmp_path).write("first/about.json", {"of": "a"})
    folder = open_folder(tmp_path, {"first": {"model": "b"}})
    assert folder.read("first/settings.json") == {"model": "b"} and folder.read("first/about.json") is None


def test_overwrite_removes_own_files_and_leaves_others(tmp_path):
    open_folder(tmp_path, FIRST | SECOND).write("first/result_1.json", {})
    for name in ("notes.txt", "first/notes.json"):
        (tmp_path / name).write_text("mine")
    folder = open_folder(tmp_path, {"first": {"model": "b"}}, overwrite=True)
    assert folder.read("first/settings.json") == {"model": "b"}
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"first/settings.json", "first/notes.json", "notes.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_refused(tmp_path, overwrite):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: exists and is not a folder"):
        open_folder(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(UserError, match=r"is not empty and holds no run; choose another folder \(--out\)"):
        open_folder(tmp_path, overwrite=overwrite)
    for content, message in {
        '{"learning_rate": 1}': "belongs to another program",
        "[1]": "is not a file of this command",
        "{": "is not JSON",
    }.items():
        settings = tmp_path / "first" / "settings.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(content)
        with pytest.raises(UserError, match=message):
            open_folder(tmp_path, overwrite=overwrite)
        assert settings.read_text() == content


def test_a_damaged_result_is_named_with_what_to_do(tmp_path):
    folder = open_folder(tmp_path)
    (tmp_path / "first" / "result_1.json").write_text('{"value": 1')
    with pytest.raises(UserError, match=r"result_1.json: is not JSON; remove it, or --overwrite starts afresh"):
        folder.read("first/result_1.json")
