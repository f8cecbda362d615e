"""Runs the kernel scripts of this folder, each in a process of its own.

Whether Triton interprets is decided when it is imported, and a compiled process stands in for another driver.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy
import pytest
from processes import run_python
from repository import ROOT, SUPPORT, TESTS

from hf_depthattn.kernels.triton_runtime import triton_version

TARGETS = ("sm_80", "sm_90", "sm_100")

needs_triton = pytest.mark.skipif(triton_version() is None, reason="Triton is not installed")
needs_loops_in_interpreter = pytest.mark.skipif(
    triton_version() is not None
    and triton_version() < (3, 7)
    and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot run loops of run-time length with numpy 2.4 and later",
)


def run(script: str, *arguments: str, tmp_path: Path, **environment: str) -> list[str]:
    """Runs a script of this folder where it finds the checkout and the Triton of this process; returns its lines."""
    triton_home = Path(importlib.util.find_spec("triton").origin).parent.parent
    result = run_python(
        str(TESTS / script),
        *arguments,
        cwd=tmp_path,
        python_path=os.pathsep.join(map(str, (ROOT, SUPPORT, triton_home))),
        TRITON_CACHE_DIR=str(tmp_path),
        **environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def run_checks(script: str, *checks: str, tmp_path: Path, **environment: str) -> None:
    lines = run(script, *checks, tmp_path=tmp_path, **environment)
    assert lines[-len(checks) :] == [f"{check} ok" for check in checks]


def check_binaries(lines: list[str], may_spill: str | None = None) -> None:
    """Nothing spills, but for a little in the binaries whose names start with `may_spill`."""
    rows = [json.loads(line) for line in lines]
    assert rows
    for row in rows:
        if may_spill is not None and row["name"].startswith(may_spill):
            assert row["stack"] <= 72 and row["local_accesses"] <= 0.015 * row["instructions"], row
        else:
            assert row["stack"] == 0 and row["local_accesses"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
