"""MoDA's depth kernels against the torch form in float64, what the ops on top of them promise, and their binaries."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from compiled_kernels import CompiledLaunches, Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import DEVICE, TARGETS, binary_cases, check_close, compiled_only, doubles, in_every_dtype, wide
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_depthattn import moda_attention_ops, op_dispatch
from hf_depthattn.kernels import moda_depth_ops
from hf_depthattn.kernels.moda_depth import moda_depth_backward_kernel, moda_depth_forward_kernel
from hf_depthattn.kernels.moda_depth_configs import BACKWARD_CONFIGS, FORWARD_CONFIGS, MAX_REGISTERS
from hf_depthattn.moda_attention_ops import ModaInputs, moda_attention, moda_attention_reference
from hf_depthattn.moda_depth_ops import MODA_DEPTH_FORWARD, depth_backward, depth_forward, moda_depth_merge

#: (batch, tokens, query heads, key-value heads, key dimension, value dimension, slots, softcap)
CASES = [
    (1, 1, 1, 1, 16, 16, 1, 0.0),
    (2, 5, 4, 2, 16, 16, 2, 0.0),
    (1, 3, 6, 2, 40, 24, 3, 0.0),
    (1, 3, 7, 1, 64, 64, 17, 0.0),
    (1, 2, 8, 1, 80, 80, 16, 1.5),
    (1, 2, 16, 2, 128, 128, 5, 0.0),
    (1, 2, 2, 2, 256, 256, 33, 0.0),
    (1, 2, 3, 1, 24, 40, 4, 2.0),
    (1, 1, 32, 2, 7, 5, 1, 0.0),
]


def states(shape: tuple[int, int, int, int], dtype: torch.dtype, contiguous: bool) -> Tensor:
    """[B, H, T, d], strided as attention modules lay them out, or contiguous."""
    batch, heads, tokens, dim = shape
    x = torch.randn(batch, tokens, heads, dim, dtype=torch.float64).to(DEVICE, dtype).transpose(1, 2)
    return x.contiguous() if contiguous else x


@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-T{}-H{}-G{}-d{}-dv{}-N{}-c{}".format(*case))
@in_every_dtype
def test_parity(case, dtype):
    """Output, log-sum-exp and every gradient equal those of the torch form in float64."""
    batch, tokens, heads, kv_heads, key_dim, value_dim, num_slots, softcap = case
    query = states((batch, heads, tokens, key_dim), dtype, False)
    if moda_depth_ops.moda_depth_limit(query, [query], [query]) is not None:
        assert dtype == torch.float32 and key_dim == 256
        pytest.skip("the compiled kernels take float32 up to 128 dimensions")
    seq_out = states((batch, heads, tokens, value_dim), dtype, True)
    seq_lse = torch.randn(batch, heads, tokens, dtype=wide(dtype), device=DEVICE)
    if tokens > 1:
        # A token that sees no key.
        seq_lse[0, 0, 0] = -torch.inf
    # Slots differ in their strides, as those of attention and MLP sublayers may.
    keys = [states((batch, kv_heads, tokens, key_dim), dtype, i % 2 == 1) for i in range(num_slots)]
    values = [states((batch, kv_heads, tokens, value_dim), dtype, i % 3 == 1) for i in range(num_slots)]
    exact_inputs = (query.double(), [x.double() for x in keys], [x.double() for x in values])
    options = (key_dim**-0.5, softcap)
    out, lse = moda_depth_ops.depth_forward_triton(query, keys, values, seq_out, seq_lse, *options)
    exact = depth_forward(*exact_inputs, seq_out.double(), seq_lse.double(), *options)
    check_close("out", dtype, [out], exact[:1])
    check_close("log-sum-exp", wide(dtype), [lse], exact[1:2])
    grad = torch.randn_like(out)
    gradients = moda_depth_ops.depth_backward_triton(grad, query, keys, values, out, lse, *options)
    exact = depth_backward(grad.double(), *exact_inputs, out.double(), lse.double(), *options)
    check_close("dq", dtype, gradients[:1], exact[:1])
    for name, actual, expected, slots in zip(("dk", "dv"), gradients[1:], exact[1:], (keys, values), strict=True):
        # Together: a slot of little weight has gradients near zero.
        check_close(name, dtype, [torch.stack(actual)], [torch.stack(expected)])
        assert all(x.shape == y.shape and x.dtype == dtype for x, y in zip(actual, slots, strict=True))


def make_inputs(tokens: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, three depth keys, three depth values and a gate, as leaves."""
    query = [states((2, 4, tokens, 16), dtype, False)]
    inputs = query + [states((2, 2, tokens, 16), dtype, i % 2 == 1) for i in range(8)]
    return [x.requires_grad_() for x in [*inputs, torch.rand(4, dtype=dtype, device=DEVICE)]]


def attention(query, key, value, *rest, impl: str = "triton") -> Tensor:
    keys, values, gate = list(rest[:3]), list(rest[3:6]), rest[6]
    inputs = ModaInputs(query, key, value, keys, values, scale=0.3, causal=True, gate=gate)
    return moda_attention(inputs, impl=impl)[0]


@pytest.mark.interpreted
def test_gated_attention_on_the_kernels_equals_the_reference(monkeypatch):
    """The whole op: values and gradients, and the spy saw the kernels run."""
    calls = []
    for name in ("moda_depth_forward", "moda_depth_backward"):
        op = op_dispatch.OPS[name]

        def spy(*arguments, op=op):
            calls.append(op.name)
            return op.triton_impl(*arguments)

        monkeypatch.setitem(op_dispatch.OPS, name, dataclasses.replace(op, triton_impl=spy))
    leaves = make_inputs()
    out = attention(*leaves)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    assert calls == ["moda_depth_forward", "moda_depth_backward"]
    exact = doubles(leaves)
    query, key, value, *slots, gate = exact
    inputs = ModaInputs(query, key, value, slots[:3], slots[3:], scale=0.3, causal=True, gate=gate)
    expected = moda_attention_reference(inputs)[0]
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_rmse(actual, wanted) <= 2 * RELATIVE_RMSE[torch.float32]
    del calls[:]
    attention(*leaves, impl="auto")
    assert not calls, "auto on a CPU takes torch"


@pytest.mark.interpreted
def test_opcheck_of_attention():
    query, key, value, *slots, gate = make_inputs()
    torch.library.opcheck(
        torch.ops.depthattn.moda_fused_attention.default,
        (*ModaInputs(query, key, value, slots[:3], slots[3:], 0.3, causal=True, gate=gate), "flash_cpu", "triton"),
    )


@pytest.mark.interpreted
def test_opcheck_of_the_merge():
    query, _, _, *slots, _ = make_inputs()
    seq_lse = torch.randn(2, 4, 5).requires_grad_()
    arguments = (query, slots[:3], slots[3:], torch.randn_like(query), seq_lse, 0.3, 0.0, "triton")
    torch.library.opcheck(torch.ops.depthattn.moda_depth_merge.default, arguments)
    with torch.no_grad():
        query, *slots, seq_out, seq_lse = (x.detach() for x in (query, *slots, *arguments[3:5]))
        out, lse = moda_depth_merge(query, slots[:3], slots[3:], seq_out, seq_lse, scale=0.3, impl="triton")
    torch.library.opcheck(
        torch.ops.depthattn.moda_depth_merge_backward.default,
        (out, query, slots[:3], slots[3:], seq_out, seq_lse, out, lse, 0.3, 0.0, "triton"),
    )


@pytest.mark.interpreted
def test_compiles_to_one_graph_for_all_lengths():
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        leaves = make_inputs(tokens)
        results = []
        for function in (attention, compiled):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.interpreted
def test_without_slots_the_sequence_part_comes_back_in_memory_of_its_own():
    query, seq_out, seq_lse = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1)
    out, lse = moda_depth_merge(query, [], [], seq_out, seq_lse, scale=1.0, impl="triton")
    assert torch.equal(out, seq_out.transpose(1, 2)) and torch.equal(lse, seq_lse)
    assert out.data_ptr() != seq_out.data_ptr() and lse.data_ptr() != seq_lse.data_ptr()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [
        (torch.bfloat16, 16, "got torch.bfloat16"),
        (torch.float32, 264, "keys must have at most 256 dimensions per head in torch.float32, got 264"),
    ],
    ids=["bfloat16", "too many dimensions"],
)
def test_what_cannot_be_done_is_named(dtype, dim, message):
    assert moda_attention_ops.resolve is op_dispatch.resolve
    query = states((1, 2, 3, dim), dtype, False)
    with pytest.raises(RuntimeError, match=message):
        moda_depth_merge(query, [query], [query], query, torch.zeros(1, 2, 3), scale=1.0, impl="triton")


def forward_of(dtype: torch.dtype, dim: int, impl: str = "auto"):
    """The implementation for CUDA tensors, fake ones."""
    with FakeTensorMode():
        query = torch.empty(2, 4, 3, dim, device="cuda", dtype=dtype)
        return op_dispatch.resolve(MODA_DEPTH_FORWARD, impl, query.device, (query, [query], [query]))


@compiled_only
def test_cuda_tensors_take_the_kernels():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert forward_of(dtype, 64) is moda_depth_ops.depth_forward_triton
        assert forward_of(dtype, 64, "torch") is depth_forward
    assert forward_of(torch.bfloat16, 256) is moda_depth_ops.depth_forward_triton
    assert forward_of(torch.float32, 256) is depth_forward
    assert forward_of(torch.float64, 64) is depth_forward


@compiled_only
def test_attention_has_the_right_shape_on_cuda_tensors():
    with FakeTensorMode():
        query, key, value, *slots, gate = (
            torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            for shape in [(2, 4, 3, 64)] + [(2, 2, 3, 64)] * 8 + [(4,)]
        )
        out, _ = moda_attention(ModaInputs(query, key, value, slots[:3], slots[3:], 0.3, causal=True, gate=gate))
        assert out.shape == (2, 3, 4, 64) and out.dtype == torch.bfloat16 and out.device.type == "cuda"


# --- binaries, compiled ahead of time for GPUs that need not be there ---

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DIRECTIONS = {
    "forward": (moda_depth_forward_kernel, FORWARD_CONFIGS, 8),
    "backward": (moda_depth_backward_kernel, BACKWARD_CONFIGS, 16),
}


class Binary(NamedTuple):
    """One binary: direction, dtype, query heads of a key-value head, dimensions of a key and of a value, soft cap."""

    direction: str
    dtype: str
    group: int
    key_dim: int
    value_dim: int
    has_softcap: bool = False

    def __str__(self) -> str:
        softcap = "-softcap" if self.has_softcap else ""
        return f"moda-{self.direction}-{self.dtype}-G{self.group}-d{self.key_dim}-dv{self.value_dim}{softcap}"


#: What is compiled for every target; SOME, for sm_90, is every committed configuration in bf16 and fp32.
FEW = [Binary(direction, "bf16", 8, dim, dim) for direction in DIRECTIONS for dim in (64, 128)]


def committed(dtypes: tuple[str, ...], groups: tuple[int, ...]) -> list[Binary]:
    return [
        Binary(direction, dtype, group, width, width)
        for direction, (_, configs, _) in DIRECTIONS.items()
        for dtype in dtypes
        for width in configs[ELEMENT_BYTES[dtype]]
        for group in groups
    ]


SOME = list(dict.fromkeys([*FEW, *committed(("bf16", "fp32"), (8,))]))


def every() -> list[Binary]:
    """All dtypes, groups, uneven dimensions and soft caps over the whole table."""
    cases = committed(("bf16", "fp16", "fp32"), (1, 7, 8, 16))
    for case in committed(("bf16", "fp16", "fp32"), (8,)):
        cases += [case._replace(key_dim=case.key_dim * 5 // 8), case._replace(has_softcap=True)]
    return cases


def compile_binary(case: Binary, target: str) -> dict:
    kernel, configs, smallest_group = DIRECTIONS[case.direction]
    widths = [max(16, triton.next_power_of_2(dim)) for dim in (case.key_dim, case.value_dim)]
    config = configs[ELEMENT_BYTES[case.dtype]][max(widths)]
    constants = {
        "HK": 8,
        "G": case.group,
        "GP": max(smallest_group, triton.next_power_of_2(case.group)),
        "D": case.key_dim,
        "DV": case.value_dim,
        "DP": widths[0],
        "DVP": widths[1],
        "BL": config.num_slots,
        "HAS_SOFTCAP": case.has_softcap,
        "IS_ALIGNED": case.key_dim % 8 == 0,
        "WIDE": tl.float32,
        "PRECISION": config.precision,
    }
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name == "table_ptr":
            arguments[name] = Pointer("i64")
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if "lse" in name else case.dtype)
        else:
            arguments[name] = "fp32" if name in ("scale", "softcap") else "i32"
    used = resources(compile_kernel(kernel, arguments, target, config.num_warps, maxnreg=MAX_REGISTERS))
    elements = config.num_slots * (case.key_dim + case.value_dim)
    per_element = instructions_per_element(target, used, config.num_warps, elements)
    return {"name": str(case), **used._asdict(), "instructions_per_element": per_element}


@compiled_only
@pytest.mark.parametrize(("target", "case"), binary_cases(FEW, SOME, targets=TARGETS))
def test_binaries_spill_nothing_and_have_not_grown(target, case, check_binary):
    check_binary(target, compile_binary(case, target))


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype_group_and_shape_spills_nothing(target, check_binary):
    for case in every():
        check_binary(target, compile_binary(case, target))


@compiled_only
def test_one_binary_serves_every_length_and_number_of_slots(other_gpu, monkeypatch):
    """The ops' own launches bind and compile, one binary per direction."""
    forward = CompiledLaunches(moda_depth_forward_kernel, "sm_90")
    backward = CompiledLaunches(moda_depth_backward_kernel, "sm_90")
    monkeypatch.setattr(moda_depth_ops, "moda_depth_forward_kernel", forward)
    monkeypatch.setattr(moda_depth_ops, "moda_depth_backward_kernel", backward)
    for num_tokens, num_slots in ((1, 1), (5, 3), (16, 16), (63, 33)):

        def zeros(heads, num_tokens=num_tokens):
            return torch.zeros(2, num_tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2)

        slots = [zeros(2) for _ in range(num_slots)]
        inputs, lse = (zeros(16), slots, slots), torch.zeros(2, 16, num_tokens)
        out, _ = moda_depth_ops.depth_forward_triton(*inputs, zeros(16), lse, 0.125, 0.0)
        moda_depth_ops.depth_backward_triton(out, *inputs, out, lse, 0.125, 0.0)
    for launch in (forward, backward):
        assert (launch.num_launches, len(launch.binaries)) == (4, 1), (launch.num_launches, launch.binaries)
