"""Block AttnRes' two phases without a GPU: parity in the interpreter, dispatch, binaries that spill nothing."""

import pytest
import torch
from kernel_scripts import TARGETS, check_binaries, needs_loops_in_interpreter, needs_triton, run, run_checks

pytestmark = needs_triton
CHECKS, COMPILE = "kernel_two_phase_checks.py", "kernel_two_phase_compile.py"


@pytest.mark.slow
@needs_loops_in_interpreter
@pytest.mark.parametrize("phase", ["phase1", "phase2"])
def test_interpreted_kernels(phase, tmp_path):
    checks = [f"{phase}:{dtype}" for dtype in ("float64", "float32", "float16")]
    checks += ["ops"] if phase == "phase2" else []
    run_checks(CHECKS, *checks, tmp_path=tmp_path, TRITON_INTERPRET="1")


def test_cuda_tensors_take_the_kernels(tmp_path):
    run_checks(CHECKS, "cuda_dispatch", tmp_path=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled_kernels_on_a_gpu(dtype, tmp_path):
    run_checks(CHECKS, f"phase1:{dtype}", f"phase2:{dtype}", tmp_path=tmp_path)


@pytest.mark.slow
def test_binaries_spill_nothing_and_have_not_grown(tmp_path):
    check_binaries(run(COMPILE, *TARGETS, tmp_path=tmp_path))


def test_one_binary_serves_every_number_of_tokens_and_sources(tmp_path):
    run(COMPILE, "--launches", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_next_to_nothing(target, tmp_path):
    # Rows of more than 4096 channels: 128 registers per thread hold all but 8 bytes of the backward of phase 2.
    check_binaries(run(COMPILE, target, "--every", tmp_path=tmp_path), may_spill="phase2_backward")
