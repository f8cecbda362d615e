"""The AttnRes kernels without a GPU: parity in Triton's interpreter, dispatch on fake tensors, compiled binaries."""

import pytest
import torch
from kernel_scripts import TARGETS, check_binaries, needs_loops_in_interpreter, needs_triton, run, run_checks

pytestmark = needs_triton
CHECKS, COMPILE = "kernel_attn_res_checks.py", "kernel_attn_res_compile.py"

# A process takes seconds to start: checks share some.
INTERPRETED_CHECKS = {
    "parity": ("parity:float64", "parity:float32", "parity:float16"),
    "fused": ("fused:float64", "fused:float32", "fused:float16"),
    "decode": ("decode:float64", "decode:float32", "decode:float16"),
    "pull": ("pull:float64", "pull:float32", "pull:float16"),
    "contracts": ("contracts", "second_copy", "ops", "limits"),
}


@needs_loops_in_interpreter
@pytest.mark.parametrize("checks", INTERPRETED_CHECKS.values(), ids=INTERPRETED_CHECKS)
def test_interpreted_kernels(checks, tmp_path):
    run_checks(CHECKS, *checks, tmp_path=tmp_path, TRITON_INTERPRET="1")


def test_cuda_tensors_take_the_kernels(tmp_path):
    run_checks(CHECKS, "cuda_dispatch", tmp_path=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compiled_kernels_on_a_gpu(dtype, tmp_path):
    run_checks(CHECKS, f"parity:{dtype}", f"fused:{dtype}", f"pull:{dtype}", f"decode:{dtype}", tmp_path=tmp_path)


def test_binaries_spill_nothing_and_have_not_grown(tmp_path):
    check_binaries(run(COMPILE, *TARGETS, "gfx942", tmp_path=tmp_path))


@pytest.mark.slow
def test_one_binary_serves_every_number_of_tokens(tmp_path):
    run(COMPILE, "--launches", tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_next_to_nothing(target, dtype, tmp_path):
    # Two kinds of backward launches spill some bytes: rows of more than 4096 channels, whose threads have 128
    # registers, and 16 sources of a longer read. Triton 3.6 does so most: it holds a register per reduction over the
    # whole loop.
    check_binaries(run(COMPILE, target, "--every", dtype, tmp_path=tmp_path), may_spill="backward")
