"""Reads of a few tokens without a gradient: the results of the reference, and binaries that spill nothing."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import TARGETS as ALL_TARGETS
from compiled_kernels import Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import EPS, TARGETS, binary_cases, check_close, compiled_only, doubles, in_every_dtype, read_inputs
from keyword_ops import attn_res_read, attn_res_read_reference

from hf_depthattn.kernels.attn_res_configs import decode_config
from hf_depthattn.kernels.attn_res_decode import attn_res_decode_kernel, is_decode
from hf_depthattn.kernels.attn_res_ops import attn_res_read_triton


@pytest.mark.parametrize(
    "shape", [(1, 24, 1), (5, 123, 3), (1, 640, 9), (1, 24, 34)], ids="T{0[0]}-D{0[1]}-N{0[2]}".format
)
@in_every_dtype
def test_results_are_those_of_reads_with_a_gradient_by_another_op(shape, dtype):
    num_sources = shape[2]
    with torch.no_grad():
        sources, weight = read_inputs(shape, dtype)
        options = {"eps": EPS, "read_scale": 2.0}
        out, no_weights = attn_res_read_triton(sources, weight, **options)
        assert no_weights is None
        # Weights are computed by the op with statistics.
        wanted, weights = attn_res_read(sources, weight, impl="triton", return_weights=True, **options)
        exact, _ = attn_res_read_reference(doubles(sources), weight.double(), **options)
        check_close("decode", dtype, [out, wanted], [exact, exact])
        assert weights.shape[-1] == num_sources


@in_every_dtype
def test_opcheck(dtype):
    with torch.no_grad():
        sources, weight = read_inputs((5, 123, 3), dtype)
        torch.library.opcheck(torch.ops.depthattn.attn_res_plain_inference_triton.default, (sources, weight, EPS, 2.0))


@in_every_dtype
def test_more_tokens_and_gradients_take_the_other_op(dtype):
    sources, weight = read_inputs((65, 8, 2), dtype)
    assert not is_decode(sources) and is_decode([x[:, :64] for x in sources]) and not is_decode(sources[:1] * 386)
    with torch.no_grad():
        many, _ = attn_res_read_triton(sources, weight, eps=EPS)
        exact, _ = attn_res_read_reference(doubles(sources), weight.double(), eps=EPS)
        check_close("more tokens than decode takes", dtype, [many], [exact])
    assert attn_res_read_triton([x[:, :1] for x in sources], weight, eps=EPS)[0].requires_grad


def compile_decode(dtype: str, num_channels: int, target: str) -> dict:
    """For up to eight finished sources; more are a longer tuple and the same loop."""
    options = decode_config(num_channels).launch_options(num_channels)
    source, sums = Pointer(dtype), Pointer("fp32")
    arguments = {
        "finished_ptrs": (source,) * 8,
        "newest_ptr": source,
        "table_ptr": Pointer("i64"),
        "weight_ptr": sums,
        "out_ptr": source,
        "read_scale": "fp32",
        "num_finished": "i32",
        "num_tokens": "i32",
        "EPS": Constant(1e-6),
        **{name: Constant(options[name]) for name in ("GROUP", "D", "BLOCK_D")},
    }
    num_warps = options["num_warps"]
    used = resources(compile_kernel(attn_res_decode_kernel, arguments, target, num_warps))
    return {
        "name": f"decode-{dtype}-D{num_channels}",
        **used._asdict(),
        "instructions_per_element": instructions_per_element(target, used, num_warps, options["GROUP"] * num_channels),
    }


@compiled_only
@pytest.mark.parametrize(("target", "num_channels"), binary_cases([1024, 4096], targets=ALL_TARGETS))
def test_binaries_spill_nothing_and_have_not_grown(target, num_channels, check_binary):
    check_binary(target, compile_decode("bf16", num_channels, target))


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("num_channels", [123, 1024, 2560, 4096, 7168, 8192])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype_and_width_spills_nothing(target, dtype, num_channels, check_binary):
    check_binary(target, compile_decode(dtype, num_channels, target))
