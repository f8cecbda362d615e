"""lm-eval's own command line with this package's model and tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from harness_runs import LIMIT, MAX_LENGTH
from repository import ROOT

from hf_depthattn.eval.harness.task_files import tasks_folder


def run_lm_eval(*command: str, cwd: Path, data: Path, code: str | None = None) -> str:
    environment = dict(os.environ, DEPTHATTN_DATA=str(data), PYTHONPATH=str(ROOT), LMEVAL_LOG_LEVEL="ERROR")
    start = [sys.executable, *(("-c", code) if code else ("-m", "hf_depthattn.lm_eval"))]
    result = subprocess.run([*start, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def accuracies(folder: Path) -> dict[str, float]:
    (file,) = folder.rglob("results_*.json")
    return {task: values["acc,none"] for task, values in json.loads(file.read_text())["results"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["depthattn", "hf"])
def test_entry_point_runs_lm_evals_command(checkpoints, stock_results, depthattn_data, tmp_path, model):
    out = tmp_path / "out"
    arguments = [
        "run",
        "--model",
        model,
        "--model_args",
        f"pretrained={checkpoints['both']}",
        f"max_length={MAX_LENGTH}",
    ]
    arguments += ["--tasks", "copa_local", "--limit", str(LIMIT), "--device", "cpu", "--output_path", str(out)]
    printed = run_lm_eval(*arguments, cwd=tmp_path, data=depthattn_data)
    assert "|copa_local|" in printed
    assert accuracies(out) == {"copa_local": stock_results["results"]["copa_local"]["acc,none"]}


@pytest.mark.slow
def test_plain_lm_eval_runs_an_exported_checkpoint(checkpoints, stock_results, depthattn_data, tmp_path):
    # The classes come from the checkpoint's own files: nothing imports this package before the model is built.
    code = """
import sys
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
assert not any(name.startswith("hf_depthattn.modeling") for name in sys.modules)
"""
    out = tmp_path / "out"
    arguments = [
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoints['both']}",
        f"max_length={MAX_LENGTH}",
    ]
    arguments += ["--trust_remote_code", "--tasks", "copa_local", "--limit", str(LIMIT), "--device", "cpu"]
    arguments += ["--include_path", str(tasks_folder()), "--output_path", str(out)]
    run_lm_eval(*arguments, cwd=tmp_path, data=depthattn_data, code=code)
    assert accuracies(out) == {"copa_local": stock_results["results"]["copa_local"]["acc,none"]}


def test_include_path_is_printed_for_a_plain_lm_eval(monkeypatch, capsys):
    from hf_depthattn.eval.harness import cli

    monkeypatch.setattr(sys, "argv", ["hf_depthattn.lm_eval", "include-path"])
    cli.main()
    assert capsys.readouterr().out == f"{tasks_folder()}\n"


def test_include_path_is_given_where_lm_eval_takes_one():
    from hf_depthattn.eval.harness.cli import with_include_path

    ours = ["--include_path", str(tasks_folder())]
    for arguments in (["run", "--tasks", "x"], ["ls", "tasks"], ["--model", "hf", "--tasks", "x"]):
        assert with_include_path(arguments) == [*arguments, *ours]
    for arguments in ([], ["run"], ["ls", "--help"], ["run", "--include_path", "mine"], ["ls", "--include_path=mine"]):
        assert with_include_path(arguments) == arguments


def test_an_interrupt_and_a_mistake_are_one_line(monkeypatch, capsys):
    from hf_depthattn.cli.run_command import run_command
    from hf_depthattn.errors import UserError
    from hf_depthattn.lm_eval import __main__ as program

    for error, code, line in (
        (KeyboardInterrupt(), 130, "interrupted; what lm-eval has written is kept"),
        (UserError("a: is missing"), 2, "error: a: is missing"),
    ):

        def fail(error=error):
            raise error

        monkeypatch.setattr(program, "main", fail)
        assert run_command(program.run, "hf_depthattn.lm_eval") == code
        assert capsys.readouterr().err == f"hf_depthattn.lm_eval: {line}\n"
