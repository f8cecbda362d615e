"""MoDA's Triton kernels without a GPU: parity in the interpreter, and binaries that spill nothing."""

import importlib.util
import json

import pytest
from processes import ROOT, run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
PATHS = f"{ROOT}:{ROOT / 'tests'}"


def run(script: str, *arguments: str, tmp_path, **environment: str) -> list[str]:
    paths = ":".join((PATHS, *_installed_triton()))
    result = run_python(str(ROOT / "tests" / script), *arguments, cwd=tmp_path, python_path=paths, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def _installed_triton() -> list[str]:
    """Where Triton was found, for the case that it is on a path of its own."""
    import os

    return [path for path in os.environ.get("PYTHONPATH", "").split(":") if path]


def test_kernels_equal_the_torch_form_in_the_interpreter(tmp_path):
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 cannot run loops of run-time length with numpy 2.4")
    assert run("kernels_moda_parity.py", tmp_path=tmp_path, TRITON_INTERPRET="1")[-1] == "ok"


def check_binaries(rows: list[str]) -> None:
    assert rows
    for row in map(json.loads, rows):
        assert row["stack"] == 0 and row["local_accesses"] == 0, row
        assert row["shared"] <= row["shared_limit"], row


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_committed_configurations_spill_nothing(target, tmp_path):
    check_binaries(run("kernels_moda_compile.py", target, tmp_path=tmp_path, TRITON_CACHE_DIR=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_dtype_group_and_shape_spills_nothing(target, tmp_path):
    arguments = ("kernels_moda_compile.py", target, "--every")
    check_binaries(run(*arguments, tmp_path=tmp_path, TRITON_CACHE_DIR=str(tmp_path)))
