"""Fixtures to run `depthattn eval` in a folder with a text and a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoints import save_stock

from hf_depthattn import retrofit
from hf_depthattn.cli.main import main
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT


def strict_json(path: Path):
    """Read a JSON file, and fail on NaN and infinities."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Return a function that runs `depthattn eval` and returns exit code, stdout and the lines of stderr."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(DEFAULT_TEXT[:700], encoding="utf-8")
    save_stock(Path("model"))

    def run(*arguments) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = main(["eval", *map(str, arguments), "--no-progress"])
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.fixture(scope="session")
def retrofitted_stories(depthattn_data, tmp_path_factory) -> Path:
    """Retrofit a small model trained on stories."""
    folder = tmp_path_factory.mktemp("retrofitted") / "stories"
    retrofit(depthattn_data / "stories260K" / "hf", folder, num_blocks=4)
    return folder


def run_two_tasks(command, model, *more) -> tuple[int, str, list[str]]:
    """Run six items each of two tasks."""
    return command(model, "--tasks", "copa_local,arc_easy_local", "--limit", 6, "--max-length", 1024, *more)
