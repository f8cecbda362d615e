"""Collect the files of all tasks in one folder for lm-eval's `--include_path`.

MMLU and BIG-Bench Hard have one file per subject. They differ only in names and in the description before the prompt,
so they are generated from the files of the installed lm-eval and written with our own files to a cache folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ...errors import UserError
from ...utils.paths import read_text
from .environment import cache_folder
from .installed_prompts import installed_tasks, read_installed
from .suites import TASKS_FOLDER

# Tasks and groups, and the templates that they include.
_PATTERNS = ("*.yaml", "_*_yaml")
_BBH_EXAMPLES = "hf_depthattn.eval.harness.installed_prompts.bbh_"
# Lines that name a task, a group or a tag.
_NAME = re.compile(r"^[\s-]*(?:task|group|tag|alias):\s*[\"']?(\w+)[\"']?\s*$", re.MULTILINE)


def tasks_folder() -> Path:
    """Return a cache folder with the files of all tasks, written on first use.

    Its name is a hash of its content, so it is never out of date.

    Raises:
        UserError: if lm-eval is not installed, or the folder cannot be written.
    """
    files = task_files()
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(files.items())).encode())
    folder = cache_folder() / "tasks" / digest.hexdigest()[:16]
    if not all((folder / name).is_file() for name in files):
        try:
            _write(folder, files)
        except OSError as error:
            raise UserError(
                f"{error.filename or folder}: {error.strerror}; set XDG_CACHE_HOME to a folder where the task files "
                "can be written."
            ) from error
    return folder


def task_names() -> frozenset[str]:
    """Return the names of all tasks, groups and tags in the folder."""
    return frozenset(match[1] for text in task_files().values() for match in _NAME.finditer(text))


def task_files() -> dict[str, str]:
    """Return path and content of every file in the folder, ours and generated.

    Raises:
        UserError: if lm-eval is not installed.
    """
    files = {
        file.relative_to(TASKS_FOLDER).as_posix(): read_text(file)
        for pattern in _PATTERNS
        for file in sorted(TASKS_FOLDER.rglob(pattern))
    }
    return {**files, **generated_files()}


def generated_files() -> dict[str, str]:
    """Return path and content of the files that are generated from those of the installed lm-eval."""
    files: dict[str, str] = {}
    for variant, suffix in (("default", ""), ("continuation", "_continuation")):
        for upstream in _installed(f"mmlu/{variant}/mmlu_*.yaml"):
            subject = upstream["dataset_name"]
            files[f"local/mmlu/{subject}{suffix}.yaml"] = _yaml(
                include=f"../_mmlu{suffix}_template_yaml",
                task=f"mmlu_{subject}{suffix}_local",
                tag=f"mmlu{suffix}_local_subjects",
                description=upstream["description"],
                dataset_kwargs={"subject": subject},
            )
    for upstream in _installed("bbh/cot_fewshot/[a-z]*.yaml"):
        subtask = upstream["dataset_name"]
        head = _yaml(
            include="../_bbh_template_yaml",
            task=f"bbh_cot_fewshot_{subtask}_local",
            tag="bbh_cot_fewshot_local_subtasks",
            description=upstream["description"],
            dataset_kwargs={"subtask": subtask},
        )
        examples = f"fewshot_config:\n  sampler: first_n\n  samples: !function {_BBH_EXAMPLES}{subtask}\n"
        files[f"local/bbh/{subtask}.yaml"] = head + examples
    return files


def _installed(pattern: str) -> Iterator[dict[str, Any]]:
    return map(read_installed, sorted(installed_tasks().glob(pattern)))


def _yaml(**fields: Any) -> str:
    text: str = yaml.safe_dump(fields, sort_keys=False, width=118, allow_unicode=True)
    return text


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write the folder atomically: other processes see all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        complete = Path(temporary) / "complete"
        for name, text in files.items():
            file = complete / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        # An existing folder from which files were deleted.
        shutil.rmtree(folder, ignore_errors=True)
        try:
            complete.rename(folder)
        except OSError:
            # Another process may have written it first.
            if not folder.is_dir():
                raise
