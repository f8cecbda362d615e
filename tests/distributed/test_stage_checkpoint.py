"""Pipelines on several gloo processes save checkpoints and resume (`support/checkpoint_processes.py`)."""

import os
import subprocess
import sys

import needs_stage_interface  # noqa: F401
import pytest
from checkpoint_processes import GROUPS
from repository import ROOT


def passed_cases(num_processes: int, folder, group: str) -> list[str]:
    """Run a group of cases; one start of processes for all, since that takes longer than a case."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
        # Temporary folders.
        "TMPDIR": str(folder),
    }
    script = str(ROOT / "tests/support/checkpoint_processes.py")
    command = [sys.executable, script, str(num_processes), str(folder), group]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def test_two_processes_save_one_checkpoint_and_resume(tmp_path):
    """The folder of the whole model, its logits; the losses of an uninterrupted training; errors in both processes."""
    assert passed_cases(2, tmp_path, "two") == list(GROUPS["two"])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "num_processes"), [("all-of-two", 2), ("four", 4)])
def test_every_kind_of_model_is_saved_and_resumed(tmp_path, group, num_processes):
    assert passed_cases(num_processes, tmp_path, group) == list(GROUPS[group])
