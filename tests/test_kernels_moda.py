"""MoDA's Triton kernels without a GPU: parity in the interpreter, dispatch, and binaries that spill nothing."""

import pytest
import torch
from kernel_scripts import TARGETS, check_binaries, needs_loops_in_interpreter, needs_triton, run, run_checks

pytestmark = needs_triton
CHECKS, COMPILE = "kernel_moda_checks.py", "kernel_moda_compile.py"


@needs_loops_in_interpreter
def test_interpreted_kernels(tmp_path):
    checks = ("table", "parity:float64", "parity:float32", "parity:float16", "attention", "no_slots", "ops", "limits")
    run_checks(CHECKS, *checks, tmp_path=tmp_path, TRITON_INTERPRET="1")


def test_cuda_tensors_take_the_kernels(tmp_path):
    run_checks(CHECKS, "cuda_dispatch", tmp_path=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled_kernels_on_a_gpu(dtype, tmp_path):
    run_checks(CHECKS, f"parity:{dtype}", tmp_path=tmp_path)


def test_binaries_spill_nothing_and_have_not_grown(tmp_path):
    check_binaries(run(COMPILE, *TARGETS, tmp_path=tmp_path))


def test_one_binary_serves_every_length_and_number_of_slots(tmp_path):
    run(COMPILE, "--launches", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype_group_and_shape_spills_nothing(target, tmp_path):
    check_binaries(run(COMPILE, target, "--every", tmp_path=tmp_path))
