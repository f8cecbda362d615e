"""Runs of tasks: what they write, what they refuse, and how they continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from eval_commands import run_two_tasks
from repository import ROOT

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.run import TaskOptions, run_tasks


def test_a_run_writes_lm_evals_files_and_a_table(retrofitted_stories, command):
    code, printed, errors = run_two_tasks(command, retrofitted_stories)
    assert (code, errors) == (0, [])
    folder = Path("eval_results", "stories-copa_local+arc_easy_local-limit6")
    names = sorted(path.name.split("_2")[0] for path in folder.iterdir())
    assert names == ["results", "run.json", "samples_arc_easy_local", "samples_copa_local", "table.md"]
    assert (folder / "table.md").read_text() in printed
    assert "| copa_local | acc | 0 | 6 |" in printed and "Only the first 6 items" in printed
    (file,) = folder.glob("results_*.json")
    results = json.loads(file.read_text())
    # What tools that read lm-eval's files look for.
    for key in ("results", "configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version", "task_hashes"):
        assert key in results
    assert results["config"]["model"] == "depthattn" and results["model_name"] == str(retrofitted_stories)
    # Given again, the command prints what is there.
    start = time.monotonic()
    assert run_two_tasks(command, retrofitted_stories) == (0, printed, [])
    assert len(list(folder.glob("results_*.json"))) == 1 and time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--suite, --tasks: give one of them"),
        ({"suite": "moda", "tasks": ("copa_local",)}, "--suite, --tasks: give one of them"),
        ({"tasks": ("copa_local",), "limit": 0}, "--limit 0: must be at least 1"),
        ({"tasks": ("copa_local",), "dtype": "int4"}, "--dtype int4: must be one of auto, float32"),
        ({"tasks": ("copa_local",), "batch_size": 0}, "--batch-size 0: must be at least 1, or auto"),
        ({"tasks": ("copa_local",), "exclude": ("x",)}, "--exclude x: only allowed with --suite"),
    ],
)
def test_callers_from_python_get_the_same_errors(options, message):
    with pytest.raises(UserError, match=message):
        run_tasks(TaskOptions("nowhere", **options))


def test_results_name_the_hub_repository(retrofitted_stories, command, monkeypatch):
    # Not the folder of the cache, which is another on every machine.
    from hf_depthattn.checkpoints import source_folder

    monkeypatch.setattr(source_folder, "find_folder", lambda *_: (retrofitted_stories, "owner/name"))
    code, printed, _ = command("owner/name", "--tasks", "copa_local", "--limit", 2, "--out", "run")
    assert code == 0 and printed.startswith("# owner/name\n")
    (file,) = Path("run").glob("results_*.json")
    assert json.loads(file.read_text())["model_name"] == "owner/name"
    # A Hub repository's folder is called by its commit.
    assert json.loads(Path("run", "run.json").read_text())["commit"] == retrofitted_stories.name


def test_other_settings_do_not_mix_with_a_run(retrofitted_stories, depthattn_data, command):
    assert run_two_tasks(command, retrofitted_stories, "--out", "run")[0] == 0
    code, _, errors = command(retrofitted_stories, "--tasks", "copa_local", "--limit", 6, "--out", "run")
    assert code == 2 and len(errors) == 1 and "run: holds a run with" in errors[0]
    stock = depthattn_data / "stories260K" / "hf"
    code, _, errors = run_two_tasks(command, stock, "--out", "run")
    assert code == 2 and f"with model {retrofitted_stories}, not {stock}" in errors[0]
    assert run_two_tasks(command, stock, "--out", "run", "--overwrite")[0] == 0
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").write_text("x")
    for more in ([], ["--overwrite"]):
        code, _, errors = run_two_tasks(command, stock, "--out", "foreign", *more)
        assert code == 2 and "is not empty and holds no run" in errors[0]


def test_missing_data_are_said_in_one_line(retrofitted_stories, command, monkeypatch):
    monkeypatch.setenv("DEPTHATTN_DATA", "nowhere")
    code, _, errors = command(retrofitted_stories, "--suite", "moda", "--offline")
    assert code == 2 and len(errors) == 1 and "DEPTHATTN_DATA" in errors[0]
    assert not Path("eval_results").exists()


def test_checkpoint_without_a_model_is_said_in_one_line(command, depthattn_data):
    Path("broken").mkdir()
    Path("broken", "config.json").write_text('{"model_type": "llama"}')
    code, _, errors = command("broken", "--tasks", "copa_local", "--limit", 1)
    assert code == 2 and len(errors) == 1 and errors[0].startswith("depthattn: error: broken: no model.safetensors")


@pytest.mark.slow
def test_killed_run_continues(retrofitted_stories, depthattn_data, tmp_path):
    arguments = [
        "eval",
        retrofitted_stories,
        "--suite",
        "moda",
        "--offline",
        "--limit",
        "20",
        "--out",
        tmp_path / "run",
    ]
    command = [sys.executable, "-m", "hf_depthattn.cli.main", *map(str, arguments)]
    environment = dict(os.environ, DEPTHATTN_DATA=str(depthattn_data), PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    responses = tmp_path / "run" / "responses.jsonl"
    while process.poll() is None and not (responses.exists() and responses.stat().st_size > 20_000):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    num_before = responses.read_text().count("\n")
    assert num_before > 0 and not list((tmp_path / "run").glob("results_*"))
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"resuming: {num_before} responses are stored already" in result.stderr
    assert "| MMLU | mmlu_continuation_local | acc | 0 | 1140 |" in result.stdout
    assert not responses.exists()
