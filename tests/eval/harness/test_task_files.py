"""The folder of tasks for lm-eval: what is generated, and how it gets into the cache."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import yaml
from lm_eval.tasks import TaskManager

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness import task_files
from hf_depthattn.eval.harness.suites import TASKS_FOLDER
from hf_depthattn.eval.harness.task_files import generated_files, tasks_folder


def test_every_subject_has_a_file():
    files = generated_files()
    assert len(files) == 57 + 57 + 27
    assert files["local/mmlu/anatomy.yaml"].startswith("include: ../_mmlu_template_yaml\ntask: mmlu_anatomy_local\n")
    config = yaml.safe_load(files["local/mmlu/anatomy.yaml"])
    assert config["description"] == "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert not {name for name in files if (TASKS_FOLDER / name).exists()}


def test_every_yaml_file_is_found():
    # lm-eval skips a file with a mistake without a message.
    index = TaskManager(include_path=str(tasks_folder()), include_defaults=False).task_index
    found = {entry.yaml_path.resolve() for entry in index.values() if entry.yaml_path}
    assert found == {path.resolve() for path in tasks_folder().rglob("*.yaml")}
    assert len(found) > 57 + 57 + 27


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_depthattn" / "tasks"


def test_the_folder_of_tasks_is_written_once_and_completed(cache):
    folder = tasks_folder()
    assert folder.parent == cache and list(cache.iterdir()) == [folder]
    written = {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in folder.rglob("*.yaml")}
    assert tasks_folder() == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    (folder / "local" / "mmlu" / "anatomy.yaml").unlink()
    assert tasks_folder() == folder and (folder / "local" / "mmlu" / "anatomy.yaml").is_file()
    assert list(cache.iterdir()) == [folder]


def test_other_task_files_are_another_folder(cache, monkeypatch):
    before = tasks_folder()
    monkeypatch.setattr(task_files, "generated_files", lambda: {"local/mmlu/anatomy.yaml": "task: other_local\n"})
    assert (
        tasks_folder() != before and (tasks_folder() / "local/mmlu/anatomy.yaml").read_text() == "task: other_local\n"
    )
    assert (before / "local" / "mmlu" / "virology.yaml").is_file()


def test_a_second_process_that_was_faster_is_no_error(cache, monkeypatch):
    rename = Path.rename

    def rename_after_another_process(source: Path, target: Path) -> None:
        rename(source, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(target))

    monkeypatch.setattr(Path, "rename", rename_after_another_process)
    folder = tasks_folder()
    assert (folder / "local" / "mmlu" / "anatomy.yaml").is_file() and list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.*: Not a directory; set XDG_CACHE_HOME to a folder"):
        tasks_folder()


def test_templates_have_no_task_of_their_own():
    for path in TASKS_FOLDER.rglob("_*_yaml"):
        text = "\n".join(line for line in path.read_text().splitlines() if "!function" not in line)
        assert "task" not in yaml.safe_load(text)
