"""Pytest plug-in for tests that launch Triton kernels, interpreted on a CPU or compiled on a GPU.

Triton decides on import of a kernel whether it is interpreted, so a process can only do one of the two. With
`TRITON_INTERPRET=1`, tests marked `interpreted` are ordinary tests:

    TRITON_INTERPRET=1 pytest tests/kernels/test_moda_depth_ops.py -k parity

Without the variable, the selected ones of a file become one test, `FILE::interpreted`, which runs them in a separate
process with the variable set. Tests marked `on_gpu` run compiled if there is a GPU; a test may have both marks.
"""

from __future__ import annotations

import os
import re

import numpy
import pytest
import torch
from processes import run_python
from repository import ROOT

from hf_depthattn.kernels.row_tiles import INTERPRETED
from hf_depthattn.kernels.triton_runtime import triton_version


class InterpretedTests(pytest.Item):
    """The interpreted tests of one file, run in a separate process."""

    def __init__(self, *, tests: list[str], **options) -> None:
        super().__init__(**options)
        self.tests = tests

    def runtest(self) -> None:
        result = run_python(
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *self.tests),
            cwd=ROOT,
            python_path=os.environ.get("PYTHONPATH", ""),
            TRITON_INTERPRET="1",
        )
        passed = re.search(r"^(\d+) passed(, \d+ warnings?)? in ", result.stdout, re.MULTILINE)
        if result.returncode != 0 or passed is None or int(passed[1]) != len(self.tests):
            pytest.fail(f"of {len(self.tests)} tests not all passed:\n{result.stdout}{result.stderr}", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-binaries",
        action="store_true",
        help="write the registers and instructions of compiled kernels to tests/data/kernel_instructions.json",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group interpreted tests by file after `-k` and `-m` have been applied, and skip tests that cannot run."""
    kept: list[pytest.Item] = []
    own_process: dict[pytest.Item | pytest.Collector, InterpretedTests] = {}
    for item in items:
        interpreted = item.get_closest_marker("interpreted") is not None
        on_gpu = item.get_closest_marker("on_gpu") is not None
        if interpreted and not INTERPRETED and _interpreter_fault() is None:
            if item.parent not in own_process:
                own_process[item.parent] = InterpretedTests.from_parent(item.parent, name="interpreted", tests=[])
                kept.append(own_process[item.parent])
            own_process[item.parent].tests.append(item.nodeid)
            if not (on_gpu and torch.cuda.is_available()):
                continue
        elif reason := _reason_to_skip(interpreted, on_gpu):
            item.add_marker(pytest.mark.skip(reason=reason))
        kept.append(item)
    items[:] = kept


def _reason_to_skip(interpreted: bool, on_gpu: bool) -> str | None:
    if on_gpu and not INTERPRETED and torch.cuda.is_available():
        return None
    if interpreted:
        return _interpreter_fault()
    if on_gpu:
        return "Triton's interpreter does not support bfloat16" if INTERPRETED else "no GPU"
    return None


def _interpreter_fault() -> str | None:
    """Return why the installed Triton cannot interpret kernels, or `None`."""
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if version < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton 3.6 cannot run loops of run-time length with numpy 2.4 and later"
    return None
