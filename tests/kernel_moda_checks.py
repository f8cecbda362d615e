"""Checks of MoDA's Triton kernels in the interpreter; `test_kernels_moda.py` runs them.

    TRITON_INTERPRET=1 python kernel_moda_checks.py NAME[:ARGUMENT] ...      runs the functions `check_NAME`

Without the variable `parity` runs compiled, on a GPU. Memory that a kernel was to write and did not is NaN.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor

from hf_depthattn import moda_attention_ops, op_dispatch
from hf_depthattn.kernels import launches, moda_depth_ops
from hf_depthattn.kernels.row_tiles import INTERPRETED
from hf_depthattn.moda_attention_ops import ModaInputs, moda_attention, moda_attention_reference
from hf_depthattn.moda_depth_ops import MODA_DEPTH_FORWARD, depth_backward, depth_forward, moda_depth_merge

DEVICE = "cpu" if INTERPRETED else "cuda"
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


def doubles(value):
    return [x.double() for x in value] if isinstance(value, list) else value.double()


def compare(label: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    error = relative_rmse(actual, expected)
    assert error <= bound, f"{label}: relative RMSE {error:.2e} > {bound:.0e}"


def check_table() -> None:
    """A table that kernels write, as while a CUDA graph is captured."""
    numbers = [0, 1, 16, -5, 2**40 + 3, 2**57 - 1] * 60
    for count in (1, 3, 128, 360):
        table = launches.written_table(torch.device(DEVICE), numbers[:count])
        assert table[:count].tolist() == numbers[:count]


def check_parity(dtype_name: str) -> None:
    """Output, log-sum-exp and every gradient equal those of the torch form in float64."""
    dtype = getattr(torch, dtype_name)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = RELATIVE_RMSE[dtype]
    for case in CASES:
        batch, tokens, heads, kv_heads, key_dim, value_dim, num_slots, softcap = case
        query = states((batch, heads, tokens, key_dim), dtype, False)
        if moda_depth_ops.moda_depth_limit(query, [query], [query]) is not None:
            continue
        seq_out = states((batch, heads, tokens, value_dim), dtype, True)
        seq_lse = torch.randn(batch, heads, tokens, dtype=wide, device=DEVICE)
        if tokens > 1:
            # A token that sees no key.
            seq_lse[0, 0, 0] = -torch.inf
        # Slots differ in their strides, as those of attention and MLP sublayers may.
        keys = [states((batch, kv_heads, tokens, key_dim), dtype, i % 2 == 1) for i in range(num_slots)]
        values = [states((batch, kv_heads, tokens, value_dim), dtype, i % 3 == 1) for i in range(num_slots)]
        inputs, options = (query, keys, values), (key_dim**-0.5, softcap)
        out, lse = moda_depth_ops.depth_forward_triton(*inputs, seq_out, seq_lse, *options)
        exact = depth_forward(*map(doubles, inputs), seq_out.double(), seq_lse.double(), *options)
        compare(f"{dtype} {case} out", out, exact[0], bound)
        compare(f"{dtype} {case} lse", lse, exact[1], RELATIVE_RMSE[wide])
        grad = torch.randn_like(out)
        gradients = moda_depth_ops.depth_backward_triton(grad, *inputs, out, lse, *options)
        exact = depth_backward(grad.double(), *map(doubles, inputs), out.double(), lse.double(), *options)
        compare(f"{dtype} {case} dq", gradients[0], exact[0], bound)
        for name, actual, expected, slots in zip(("dk", "dv"), gradients[1:], exact[1:], (keys, values), strict=True):
            # Together: a slot of little weight has gradients near zero.
            compare(f"{dtype} {case} {name}", torch.stack(actual), torch.stack(expected), bound)
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


def check_attention() -> None:
    """The whole op, gated, on top of the kernels: values and gradients of the reference, and the spy saw them run."""
    calls = []
    for name in ("moda_depth_forward", "moda_depth_backward"):
        op = op_dispatch.OPS[name]

        def spy(*arguments, op=op):
            calls.append(op.name)
            return op.triton_impl(*arguments)

        op_dispatch.OPS[name] = dataclasses.replace(op, triton_impl=spy)
    leaves = make_inputs()
    out = attention(*leaves)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    assert calls == ["moda_depth_forward", "moda_depth_backward"]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    query, key, value, *slots, gate = exact
    inputs = ModaInputs(query, key, value, slots[:3], slots[3:], scale=0.3, causal=True, gate=gate)
    expected = moda_attention_reference(inputs)[0]
    expected_gradients = torch.autograd.grad(expected, exact, cotangent.double())
    for actual, wanted in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        compare("attention", actual, wanted, 2 * RELATIVE_RMSE[torch.float32])
    del calls[:]
    attention(*leaves, impl="auto")
    assert not calls, "auto on a CPU takes torch"


def check_ops() -> None:
    """What `torch.library` asks of ops, with the kernels inside; and one full graph for all lengths."""
    query, key, value, *slots, gate = make_inputs()
    torch.library.opcheck(
        torch.ops.depthattn.moda_fused_attention.default,
        (*ModaInputs(query, key, value, slots[:3], slots[3:], 0.3, causal=True, gate=gate), "flash_cpu", "triton"),
    )
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
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        leaves = make_inputs(tokens)
        results = []
        for function in (attention, compiled):
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def check_no_slots() -> None:
    """Without slots the sequence part comes back, in memory of its own."""
    query, seq_out, seq_lse = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1)
    out, lse = moda_depth_merge(query, [], [], seq_out, seq_lse, scale=1.0, impl="triton")
    assert torch.equal(out, seq_out.transpose(1, 2)) and torch.equal(lse, seq_lse)
    assert out.data_ptr() != seq_out.data_ptr() and lse.data_ptr() != seq_lse.data_ptr()


def check_limits() -> None:
    """`impl="triton"` names what it cannot do."""
    assert moda_attention_ops.resolve is op_dispatch.resolve
    for dtype, dim, message in (
        (torch.bfloat16, 16, "got torch.bfloat16"),
        (torch.float32, 264, "keys must have at most 256 dimensions per head in torch.float32, got 264"),
    ):
        query = states((1, 2, 3, dim), dtype, False)
        merge = (query, [query], [query], query, torch.zeros(1, 2, 3))
        try:
            moda_depth_merge(*merge, scale=1.0, impl="triton")
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")


def check_cuda_dispatch() -> None:
    """On CUDA tensors (fake ones here) the kernels are taken where they can be."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def forward_of(dtype: torch.dtype, dim: int, impl: str = "auto"):
        with FakeTensorMode():
            query = torch.empty(2, 4, 3, dim, device="cuda", dtype=dtype)
            inputs = query, [query], [query]
            return op_dispatch.resolve(MODA_DEPTH_FORWARD, impl, query.device, inputs)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert forward_of(dtype, 64) is moda_depth_ops.depth_forward_triton
        assert forward_of(dtype, 64, "torch") is depth_forward
    assert forward_of(torch.bfloat16, 256) is moda_depth_ops.depth_forward_triton
    assert forward_of(torch.float32, 256) is depth_forward
    assert forward_of(torch.float64, 64) is depth_forward
    with FakeTensorMode():
        query, key, value, *slots, gate = (
            torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            for shape in [(2, 4, 3, 64)] + [(2, 2, 3, 64)] * 8 + [(4,)]
        )
        out, _ = moda_attention(ModaInputs(query, key, value, slots[:3], slots[3:], 0.3, causal=True, gate=gate))
        assert out.shape == (2, 3, 4, 64) and out.dtype == torch.bfloat16 and out.device.type == "cuda"


def main() -> None:
    # Fresh memory is NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        name, *arguments = check.split(":")
        globals()[f"check_{name}"](*arguments)
        print(f"{check} ok")


if __name__ == "__main__":
    main()
