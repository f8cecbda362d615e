"""Checks of Block AttnRes' two phases in Triton's interpreter; `test_kernels_two_phase.py` runs them.

    TRITON_INTERPRET=1 python kernel_two_phase_checks.py NAME[:ARGUMENT] ...      runs the functions `check_NAME`

Without the variable `parity` runs compiled, on a GPU. Memory that a kernel was to write and did not is NaN.
"""

from __future__ import annotations

import sys

import torch
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor

from hf_depthattn import op_dispatch
from hf_depthattn.experimental.attn_res_two_phase_ops import (
    attn_res_phase1,
    attn_res_phase1_reference,
    attn_res_phase2,
    attn_res_phase2_reference,
)
from hf_depthattn.kernels.row_tiles import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
EPS, NORM_EPS = 1e-6, 1e-3
# (tokens, channels, sources, reads): one and several programs, chunks and launches; every size of reads in turn.
SHAPES = [
    (1, 8, 1, 1),
    (5, 24, 3, 2),
    (18, 123, 2, 3),
    (3, 264, 4, 8),
    (5, 40, 17, 5),
    (2, 16, 33, 18),
    (17, 80, 9, 16),
]


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def doubles(tensors) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compare(label: str, dtype: torch.dtype, actual, expected) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_rmse(a, b)
        assert error <= RELATIVE_RMSE[dtype], f"{label}: result {i} of {len(expected)} is off by {error:.1e}"


def check_phase1(dtype_name: str) -> None:
    """Outputs, log-sum-exps and every gradient equal those of the reference in float64."""
    dtype = getattr(torch, dtype_name)
    for shape in SHAPES:
        tokens, channels, num_sources, num_reads = shape
        sources = [draw(1, tokens, channels, dtype=dtype) for _ in range(num_sources)]
        weights = (draw(num_reads, channels, dtype=wide(dtype)).detach() * channels**-0.5).requires_grad_()
        outs, lses = attn_res_phase1(sources, weights, eps=EPS, impl="triton")
        assert outs[0].grad_fn.name().startswith("GeneratedBackwardFor_depthattn_attn_res_phase1_triton")
        upstream = [torch.randn_like(x) for x in (*outs, *lses)]
        grads = torch.autograd.grad([*outs, *lses], [*sources, weights], upstream)
        exact = doubles([*sources, weights])
        exact_outs, exact_lses = attn_res_phase1_reference(exact[:-1], exact[-1], eps=EPS)
        exact_grads = torch.autograd.grad([*exact_outs, *exact_lses], exact, [x.double() for x in upstream])
        compare(f"phase 1 {shape} outs", dtype, outs, exact_outs)
        compare(f"phase 1 {shape} lses", dtype, lses, exact_lses)
        # Gradients of all sources together: a source of little weight has one near zero.
        compare(f"phase 1 {shape} gradients", dtype, [torch.stack(grads[:-1])], [torch.stack(exact_grads[:-1])])
        compare(f"phase 1 {shape} gradient of weights", dtype, grads[-1:], exact_grads[-1:])


def check_phase2(dtype_name: str) -> None:
    """With and without the sum before and the norm after."""
    dtype = getattr(torch, dtype_name)
    for tokens, channels, *_ in SHAPES:
        for has_update, has_norm in ((False, False), (True, False), (False, True), (True, True)):
            partial, seq_out = (draw(1, tokens, channels, dtype=dtype) for _ in range(2))
            update = draw(1, tokens, channels, dtype=dtype) if has_update else None
            lse = draw(1, tokens, dtype=wide(dtype))
            weight = (draw(channels, dtype=wide(dtype)).detach() * channels**-0.5).requires_grad_()
            norm_weight = draw(channels, dtype=wide(dtype)) if has_norm else None
            options = {"eps": EPS, "read_scale": 2.0, "norm_eps": NORM_EPS}
            leaves = [x for x in (partial, update, seq_out, lse, weight, norm_weight) if x is not None]
            results = list(
                attn_res_phase2(
                    partial, update, seq_out, lse, weight, norm_weight=norm_weight, impl="triton", **options
                )
            )
            results = results if has_update else results[:1]
            upstream = [torch.randn_like(x) for x in results]
            grads = torch.autograd.grad(results, leaves, upstream)

            exact = dict(zip(map(id, leaves), doubles(leaves), strict=True))
            exact_partial, exact_update = exact[id(partial)], exact.get(id(update))
            if has_update:
                # The read sees the rounded sum, whose rounding has no gradient of its own.
                total = exact_partial + exact_update
                exact_partial, exact_update = total + ((partial + update).double() - total).detach(), None
            expected = list(
                attn_res_phase2_reference(
                    exact_partial, exact_update, *(exact[id(x)] for x in (seq_out, lse, weight)),
                    norm_weight=exact.get(id(norm_weight)), **options,
                )
            )  # fmt: skip
            expected = expected if has_update else expected[:1]
            exact_grads = torch.autograd.grad(expected, list(exact.values()), [x.double() for x in upstream])
            compare(
                f"phase 2 {tokens, channels, has_update, has_norm}",
                dtype,
                [*results, *grads],
                [*expected, *exact_grads],
            )


def inputs(tokens: int = 5) -> list[Tensor]:
    """Three sources, the open block, an update, the score weights of two reads and the norm's weight."""
    of_tokens = [draw(1, tokens, 24, dtype=torch.float32) for _ in range(5)]
    return of_tokens + [draw(24, dtype=torch.float32) for _ in range(3)]


def two_reads(*leaves: Tensor, impl: str = "triton") -> tuple[Tensor, ...]:
    """Both phases in the order of a block; only the second read has an update and a norm."""
    *sources, partial, update, first, second, norm_weight = leaves
    outs, lses = attn_res_phase1(sources, torch.stack((first, second)), eps=EPS, impl=impl)
    h, _ = attn_res_phase2(partial, None, outs[0], lses[0], first, eps=EPS, impl=impl)
    normed, total = attn_res_phase2(
        partial, update, outs[1], lses[1], second, eps=EPS, norm_weight=norm_weight, norm_eps=NORM_EPS, impl=impl
    )
    return h, normed, total


def check_ops() -> None:
    """What `torch.library` asks of ops; a full graph for all lengths; unused reads; the same bits every time."""
    *sources, partial, update, first, second, norm_weight = inputs()
    weights = torch.stack((first, second)).detach().requires_grad_()
    ops = torch.ops.depthattn
    torch.library.opcheck(ops.attn_res_phase1_triton.default, (sources, weights, EPS))
    lse = draw(1, 5, dtype=torch.float32)
    for extra in (None, update):
        norm = None if extra is None else norm_weight
        arguments = (partial, extra, sources[0], lse, first, EPS, 2.0, norm, NORM_EPS)
        torch.library.opcheck(ops.attn_res_phase2_triton.default, arguments)
    with torch.no_grad():
        plain = [x.detach() for x in sources]
        outs, lses, logits, rstd = ops.attn_res_phase1_triton(plain, weights.detach(), EPS)
        torch.library.opcheck(
            ops.attn_res_phase1_triton_backward.default, (outs, lses, plain, weights.detach(), lses, logits, rstd)
        )
        arguments = tuple(None if x is None else x.detach() if isinstance(x, Tensor) else x for x in arguments)
        out, total, stats = ops.attn_res_phase2_triton(*arguments)
        arguments = (out, total, total, outs[0], lses[0], arguments[4], arguments[7], stats, 2.0)
        torch.library.opcheck(ops.attn_res_phase2_triton_backward.default, arguments)

    compiled = torch.compile(two_reads, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        leaves = inputs(tokens)
        results = []
        for function in (two_reads, compiled, two_reads):
            outs = function(*leaves)
            results.append([*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), leaves)])
        for actual, expected, again in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
            assert torch.equal(actual, again)
    only_first = torch.autograd.grad(two_reads(*leaves)[0].sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad(two_reads(*leaves, impl="torch")[0].sum(), leaves, allow_unused=True)
    for actual, expected in zip(only_first, wanted, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def check_cuda_dispatch() -> None:
    """On CUDA tensors (fake ones here) the kernels are taken, with the right shapes, where they can be."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def ops_of(channels: int, dtype: torch.dtype) -> set[str]:
        with FakeTensorMode():
            tensors = [torch.empty(1, 5, channels, device="cuda", dtype=dtype) for _ in range(5)]
            weights = [torch.empty(channels, device="cuda") for _ in range(3)]
            graph = make_fx(lambda *leaves: two_reads(*leaves, impl="auto"))(*tensors, *weights)
            for result in graph(*tensors, *weights):
                assert result.shape == (1, 5, channels) and result.dtype == dtype and result.device.type == "cuda"
        return {str(node.target) for node in graph.graph.nodes}

    fast = {"depthattn.attn_res_phase1_triton.default", "depthattn.attn_res_phase2_triton.default"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fast <= ops_of(24, dtype)
    assert not fast & ops_of(8200, torch.bfloat16) and not fast & ops_of(24, torch.float64)


def main() -> None:
    # Fresh memory is NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and op_dispatch.OPS["attn_res_phase1"].triton_impl
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        name, *arguments = check.split(":")
        globals()[f"check_{name}"](*arguments)
        print(f"{check} ok")


if __name__ == "__main__":
    main()
