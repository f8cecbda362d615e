"""Binaries of the pull kernel, compiled ahead of time; its layout does not depend on anything."""

from __future__ import annotations

import pytest
from compiled_kernels import Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import TARGETS, compiled_only

from hf_depthattn.kernels.attn_res_pull import attn_res_pull_kernel
from hf_depthattn.kernels.attn_res_pull_ops import BLOCK_D, BLOCK_T, NUM_WARPS

pytestmark = compiled_only
every_row = pytest.mark.parametrize(("num_channels", "has_direct"), [(4096, True), (123, False)])


def compile_pull(dtype: str, num_channels: int, has_direct: bool, target: str) -> dict:
    """`attn_res_pull` of a source that is, or is not, used directly too."""
    source, sums = Pointer(dtype), Pointer("fp32")
    arguments = {
        "table_ptr": Pointer("i64"),
        "source_ptr": source,
        "direct_ptr": source if has_direct else Constant(None),
        "weight_like_ptr": sums,
        "grad_ptr": source,
        "num_tokens": "i32",
        "num_reads": "i32",
        "D": Constant(num_channels),
        "BLOCK_T": Constant(BLOCK_T),
        "BLOCK_D": Constant(BLOCK_D),
    }
    used = resources(compile_kernel(attn_res_pull_kernel, arguments, target, NUM_WARPS))
    return {
        "name": f"pull-{dtype}-D{num_channels}-{'direct' if has_direct else 'alone'}",
        **used._asdict(),
        "instructions_per_element": instructions_per_element(target, used, NUM_WARPS, BLOCK_T * BLOCK_D),
    }


@every_row
@pytest.mark.parametrize("target", [*TARGETS, "gfx942"])
def test_binaries_spill_nothing_and_have_not_grown(target, num_channels, has_direct, check_binary):
    check_binary(target, compile_pull("bf16", num_channels, has_direct, target))


@pytest.mark.slow
@every_row
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_binaries_of_other_dtypes_spill_nothing(target, dtype, num_channels, has_direct, check_binary):
    check_binary(target, compile_pull(dtype, num_channels, has_direct, target))
