"""The command that trains the grid: it finishes what is missing, and can be killed at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future

import psutil
import pytest
from pretraining_study import TINY, made_up_result
from repository import ROOT

from benchmarks.pretraining import corpora, grid
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.runs import Run, Setting
from hf_depthattn.errors import UserError

STUDY = Study("tiny", 60, ("prenorm_scaled", "retrofit_control"), num_layers=1, num_seeds=2)


class Inline:
    """A pool of processes that works in this one."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(autouse=True)
def tiny_corpus(monkeypatch, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abcd" * 50)
    monkeypatch.setitem(corpora.CORPORA, "tiny", lambda: ([file], [file]))
    monkeypatch.setattr(grid, "ProcessPoolExecutor", Inline)
    corpora.read_corpus.cache_clear()
    yield
    corpora.read_corpus.cache_clear()


def train_all(folder, study=STUDY, setting=TINY):
    return grid.train_all(study, setting, folder / "results", folder / "models", workers=2)


def test_a_tiny_grid_is_trained_to_its_end(tmp_path, capsys):
    found = train_all(tmp_path)
    plan = Plan(STUDY, {run: result.loss for run, result in found.items()})
    assert not plan.missing()
    assert len(plan.seeds("prenorm_scaled")) == len(plan.seeds("retrofit_control")) == 2
    assert capsys.readouterr().out.count("nats per byte") == len(found)


def test_an_interrupted_grid_goes_on_where_it_was(tmp_path, monkeypatch):
    carry_out, done = grid.carry_out, []

    def interrupted(run, *more):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        carry_out(run, *more)

    monkeypatch.setattr(grid, "carry_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_all(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    assert len(before) == 3
    monkeypatch.setattr(grid, "carry_out", lambda run, *more: done.append(run) or carry_out(run, *more))
    found = train_all(tmp_path)
    assert sorted(map(str, done)) == sorted(map(str, found))
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_runs_are_not_added_to_results_with_another_setting(tmp_path):
    path = tmp_path / "results" / "tiny" / "60" / "a.json"
    path.parent.mkdir(parents=True)
    result = made_up_result(Run("tiny", 60, "prenorm", 1, 1e-3), 1.0, setting=Setting(hidden_size=32).to_dict())
    path.write_text(json.dumps({"benchmark": "pretraining", **vars(result), "run": result.run.to_dict()}))
    with pytest.raises(UserError, match="setting hidden_size is 32, but 16 in this command"):
        train_all(tmp_path)


def test_a_wrong_option_is_one_line(tmp_path, capsys):
    assert grid.main(["--set", "width=3", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_killed_command_leaves_whole_results_only_and_no_process(tmp_path):
    options = [f"--set={name}={value}" for name, value in TINY.to_dict().items()]
    command = [sys.executable, "-m", "benchmarks.pretraining.grid", "--arms", "prenorm", "--workers", "1", *options]
    command += ["--tokens", "4000", "--num-layers", "2", "--seeds", "1", "--models", str(tmp_path / "models")]
    command += ["--results", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert "nats per byte" in process.stdout.readline()
        workers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    results = {path: path.read_text() for path in (tmp_path / "results").rglob("*.json")}
    assert results and all(json.loads(text)["benchmark"] == "pretraining" for text in results.values())
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert all(path.read_text() == text for path, text in results.items())
    assert len(list((tmp_path / "results").rglob("*.json"))) >= 3
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
