"""The AttnRes kernels without a GPU: parity in Triton's interpreter, dispatch on fake tensors, compiled binaries.

Each test runs in a process of its own: whether Triton interprets is decided when it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from processes import ROOT, run_python

_SPEC = importlib.util.find_spec("triton")
TARGETS = ("sm_80", "sm_90", "sm_100")
pytestmark = pytest.mark.skipif(_SPEC is None, reason="Triton is not installed")


def triton_version() -> tuple[int, ...]:
    from hf_depthattn.kernels import triton_runtime

    return triton_runtime.triton_version()


def run(script: str, *arguments: str, tmp_path: Path, **environment: str) -> list[str]:
    """Runs a script of this folder where it finds the checkout and the Triton of this process; returns its lines."""
    paths = [ROOT, ROOT / "tests", Path(_SPEC.origin).parent.parent]
    result = run_python(
        str(ROOT / "tests" / script),
        *arguments,
        cwd=tmp_path,
        python_path=os.pathsep.join(map(str, paths)),
        TRITON_CACHE_DIR=str(tmp_path),
        **environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


# A process takes seconds to start: checks share some.
INTERPRETED_CHECKS = {
    "parity": ("parity:float64", "parity:float32", "parity:float16"),
    "fused": ("fused:float64", "fused:float32", "fused:float16"),
    "contracts": ("contracts", "second_copy", "ops", "limits"),
}


def run_checks(*checks: str, tmp_path: Path, **environment: str) -> None:
    lines = run("kernel_attn_res_checks.py", *checks, tmp_path=tmp_path, **environment)
    assert lines[-len(checks) :] == [f"{check} ok" for check in checks]


@pytest.mark.parametrize("checks", INTERPRETED_CHECKS.values(), ids=INTERPRETED_CHECKS)
def test_interpreted_kernels(checks, tmp_path):
    if triton_version() < (3, 7) and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot run loops of run-time length with numpy 2.4 and later")
    run_checks(*checks, tmp_path=tmp_path, TRITON_INTERPRET="1")


def test_cuda_tensors_take_the_kernels(tmp_path):
    run_checks("cuda_dispatch", tmp_path=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled_kernels_on_a_gpu(dtype, tmp_path):
    run_checks(f"parity:{dtype}", f"fused:{dtype}", tmp_path=tmp_path)


def check_binaries(lines: list[str], may_spill: bool = False) -> None:
    rows = [json.loads(line) for line in lines]
    assert rows
    for row in rows:
        if may_spill and row["name"].startswith("backward"):
            assert row["stack"] <= 72 and row["local_accesses"] <= 0.015 * row["instructions"], row
        else:
            assert row["stack"] == 0 and row["local_accesses"] == 0, row
        assert row["shared"] <= row["shared_limit"], row


def test_binaries_spill_nothing_and_have_not_grown(tmp_path):
    check_binaries(run("kernel_attn_res_compile.py", *TARGETS, "gfx942", tmp_path=tmp_path))


def test_one_binary_serves_every_number_of_tokens(tmp_path):
    run("kernel_attn_res_compile.py", "--launches", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_next_to_nothing(target, dtype, tmp_path):
    # Two kinds of backward launches spill some bytes: rows of more than 4096 channels, whose threads have
    # 128 registers,
    # and 16 sources of a longer read. Triton 3.6 does so most: it holds a register per reduction over the whole loop.
    check_binaries(run("kernel_attn_res_compile.py", target, "--every", dtype, tmp_path=tmp_path), may_spill=True)
