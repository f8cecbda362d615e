"""Checks of the AttnRes kernels in Triton's interpreter; `test_kernels_attn_res.py` runs one per process.

    TRITON_INTERPRET=1 python kernel_attn_res_checks.py NAME[:ARGUMENT] ...      runs the functions `check_NAME`

Without the variable the same checks run compiled, on a GPU. Never bfloat16 in the interpreter: it rounds it wrongly
and computes with its bits.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import torch
from keyword_ops import attn_res_read, attn_res_read_reference, attn_res_read_tapped, with_keywords
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hf_depthattn import attn_res_ops, op_dispatch
from hf_depthattn.attn_res_pull_ops import tap
from hf_depthattn.kernels import launches
from hf_depthattn.kernels.attn_res_decode import is_decode
from hf_depthattn.kernels.attn_res_ops import fused_attn_res_read
from hf_depthattn.kernels.attn_res_pull_ops import PULL_TRITON
from hf_depthattn.kernels.row_tiles import INTERPRETED
from hf_depthattn.remote_code import export_model_code

EPS = 1e-6
# (tokens, channels, sources): every size of the design in turn; one and several programs, chunks and launches.
SHAPES = [
    (1, 8, 1),
    (5, 24, 2),
    (63, 8, 3),
    (5, 123, 4),
    (63, 24, 5),
    (5, 512, 9),
    (1, 123, 17),
    (5, 24, 33),
    (5, 640, 2),
    (3, 264, 3),
]
FUSED_SHAPES = [(1, 8, 1), (5, 123, 3), (5, 24, 17), (33, 24, 2), (3, 264, 3)]
OP = "attn_res_read_triton"
DEVICE = "cpu" if INTERPRETED else "cuda"


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    num_tokens, num_channels, num_sources = shape
    generator = torch.Generator().manual_seed(hash(shape))
    draw = {"generator": generator, "dtype": torch.float64}
    sources = [
        (torch.randn(1, num_tokens, num_channels, **draw) * (1 + i)).to(DEVICE, dtype).requires_grad_()
        for i in range(num_sources)
    ]
    weight = torch.randn(num_channels, **draw) * num_channels**-0.5
    weight = weight.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    return sources, weight.requires_grad_()


def doubles(tensors) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def compare(label: str, dtype: torch.dtype, actual, expected) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_rmse(a, b)
        assert error <= RELATIVE_RMSE[dtype], f"{label}: result {i} of {len(expected)} is off by {error:.1e}"


def check_parity(dtype_name: str) -> None:
    """Values, weights and every gradient equal those of the reference in float64."""
    dtype = getattr(torch, dtype_name)
    for shape in SHAPES:
        sources, weight = make_inputs(shape, dtype)
        options = {"eps": EPS, "read_scale": float(shape[2]), "return_weights": True}
        h, weights = attn_res_read(sources, weight, impl="triton", **options)
        assert OP in h.grad_fn.name() and h.dtype == dtype and not weights.requires_grad
        grad_h = torch.randn_like(h)
        grads = torch.autograd.grad(h, [*sources, weight], grad_h)
        *exact_sources, exact_weight = exact = doubles([*sources, weight])
        exact_h, exact_weights = attn_res_read_reference(exact_sources, exact_weight, **options)
        exact_grads = torch.autograd.grad(exact_h, exact, grad_h.double())
        compare(f"{shape}", dtype, [h, weights, *grads], [exact_h, exact_weights, *exact_grads])
        assert weights.dtype == weight.dtype and weights.shape == exact_weights.shape
        if shape[2] == 1:
            assert torch.equal(h, sources[0]) and torch.equal(grads[0], grad_h) and not grads[1].any()


def check_fused(dtype_name: str) -> None:
    """The residual add before and the norm after the read, alone and together, equal separate operations."""
    dtype = getattr(torch, dtype_name)
    for shape in FUSED_SHAPES:
        for with_update, with_norm in ((True, False), (False, True), (True, True)):
            sources, weight = make_inputs(shape, dtype)
            update = torch.randn_like(sources[0]).requires_grad_() if with_update else None
            norm_weight = torch.randn_like(weight).requires_grad_() if with_norm else None
            options = {"eps": EPS, "read_scale": float(shape[2])}
            out, partial, _ = fused_attn_res_read(
                sources, weight, update=update, norm_weight=norm_weight, norm_eps=1e-3, **options
            )
            outputs = [out, partial] if with_update else [out]
            upstream = [torch.randn_like(output) for output in outputs]
            leaves = [*sources, weight] + [x for x in (update, norm_weight) if x is not None]
            grads = torch.autograd.grad(outputs, leaves, upstream)

            exact = doubles(leaves)
            read, exact_weight = exact[: shape[2]], exact[shape[2]]
            exact_outputs = []
            if with_update:
                total = read[-1] + exact[shape[2] + 1]
                # The rounding of the sum has no gradient of its own.
                rounded = total + ((sources[-1] + update).double() - total).detach()
                read, exact_outputs = [*read[:-1], rounded], [rounded]
            h, _ = attn_res_read_reference(read, exact_weight, **options)
            if with_norm:
                h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3) * exact[-1]
            exact_outputs = [h, *exact_outputs]
            exact_grads = torch.autograd.grad(exact_outputs, exact, [x.double() for x in upstream])
            compare(f"{shape} {with_update} {with_norm}", dtype, [*outputs, *grads], [*exact_outputs, *exact_grads])
            if with_update:
                assert torch.equal(partial, sources[-1] + update)


def check_decode(dtype_name: str) -> None:
    """Reads of a few tokens without a gradient: the same results, by another op."""
    dtype = getattr(torch, dtype_name)
    for num_tokens, num_channels, num_sources in ((1, 24, 1), (5, 123, 3), (1, 640, 9), (1, 24, 34)):
        with torch.no_grad():
            sources, weight = make_inputs((num_tokens, num_channels, num_sources), dtype)
            update, norm_weight = torch.randn_like(sources[0]), torch.randn_like(weight)
            options = {"eps": EPS, "read_scale": 2.0}
            for extra, norm in ((None, None), (update, None), (update, norm_weight)):
                arguments = {"update": extra, "norm_weight": norm, "norm_eps": 1e-3, **options}
                out, total, stats = fused_attn_res_read(sources, weight, **arguments)
                assert stats is None
                wanted, wanted_total, stats = fused_attn_res_read(sources, weight, with_stats=True, **arguments)
                assert stats is not None
                read = sources if extra is None else [*sources[:-1], total]
                exact, _ = attn_res_read_reference(doubles(read), weight.double(), **options)
                if norm is not None:
                    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-3) * norm.double()
                compare(f"decode {num_sources}", dtype, [out, wanted], [exact, exact])
                assert extra is None or torch.equal(total, wanted_total)
            arguments = (sources, weight, EPS, 2.0, update, norm_weight, 1e-3)
            if num_tokens == 5:
                torch.library.opcheck(torch.ops.depthattn.attn_res_inference_triton.default, arguments)
            _, weights = attn_res_read(sources, weight, impl="triton", return_weights=True, **options)
            assert weights.shape[-1] == num_sources
    sources, weight = make_inputs((65, 8, 2), dtype)
    assert not is_decode(sources) and is_decode([x[:, :64] for x in sources]) and not is_decode(sources[:1] * 386)
    with torch.no_grad():
        many, _, _ = fused_attn_res_read(sources, weight, eps=EPS)
        exact, _ = attn_res_read_reference(doubles(sources), weight.double(), eps=EPS)
        compare("more tokens than decode takes", dtype, [many], [exact])
    assert fused_attn_res_read([x[:, :1] for x in sources], weight, eps=EPS)[0].requires_grad


def check_pull(dtype_name: str) -> None:
    """Sources that several reads share get the gradients of separate reads, direct uses included."""
    dtype = getattr(torch, dtype_name)
    for num_tokens, num_channels, num_sources in ((5, 24, 4), (9, 123, 3), (2, 40, 18)):
        sources, weight = make_inputs((num_tokens, num_channels, num_sources), dtype)
        weights = [(weight * (i + 1)).detach().requires_grad_() for i in range(3)]

        def reads(sources, weights, tap, read, options):
            tapped = [tap(source) for source in sources]
            shared = [read(tapped[: len(tapped) - i], w, eps=EPS, **options)[0] for i, w in enumerate(weights)]
            # The newest source has no direct use, the oldest one has.
            return [*shared, tapped[0]]

        outs = reads(sources, weights, tap, attn_res_read_tapped, {"impl": "triton", "read_scale": 2.0})
        assert "PulledRead" in outs[0].grad_fn.name()
        upstream = [torch.randn_like(out) for out in outs]
        grads = torch.autograd.grad(outs, [*sources, *weights], upstream)
        exact = doubles([*sources, *weights])
        expected = reads(
            exact[:num_sources], exact[num_sources:], lambda x: x, attn_res_read_reference, {"read_scale": 2.0}
        )
        exact_grads = torch.autograd.grad(expected, exact, [x.double() for x in upstream])
        compare(f"pull {num_sources}", dtype, [*outs[:3], *grads], [*expected[:3], *exact_grads])


def check_contracts() -> None:
    """Frozen inputs, unused outputs, no tokens, views, the same bits every time."""
    sources, weight = make_inputs((5, 24, 3), torch.float32)
    sources[1].requires_grad_(False)
    h, _ = attn_res_read(sources, weight, eps=EPS, impl="triton")
    h.sum().backward()
    assert sources[1].grad is None and sources[0].grad is not None and weight.grad is not None

    frozen, weight = make_inputs((5, 24, 3), torch.float32)
    frozen = [source.detach() for source in frozen]
    assert not attn_res_read(frozen, weight.detach(), eps=EPS, impl="triton")[0].requires_grad
    update = torch.ones_like(frozen[0]).requires_grad_()
    out, partial, _ = fused_attn_res_read(frozen, weight, eps=EPS, update=update)
    (only_partial,) = torch.autograd.grad(partial.sum(), update, retain_graph=True)
    assert torch.equal(only_partial, torch.ones_like(update))
    (only_out,) = torch.autograd.grad(out.sum(), update)
    assert only_out.abs().sum() > 0

    sources, weight = make_inputs((63, 24, 3), torch.float32)
    results = []
    for _ in range(2):
        h, _ = attn_res_read(sources, weight, eps=EPS, impl="triton")
        results.append([h, *torch.autograd.grad(h.square().sum(), [*sources, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    views = [source.transpose(0, 1) for source in sources]
    h, _ = attn_res_read(views, weight, eps=EPS, impl="triton")
    assert torch.equal(h, results[0][0].transpose(0, 1))

    # A view with an offset, which kernels that find it in a table may not load 16 bytes at a time.
    view = torch.randn(5 * 24 + 1, device=DEVICE)[1:].view(5, 24)
    assert view.is_contiguous() and view.data_ptr() % 16 != 0
    assert torch.equal(launches.aligned(view), view) and launches.aligned(view).data_ptr() % 16 == 0
    assert launches.aligned(sources[0]) is sources[0]

    empty = [torch.zeros(0, 24, requires_grad=True) for _ in range(3)]
    h, _ = attn_res_read(empty, weight, eps=EPS, impl="triton")
    assert h.shape == (0, 24)
    assert not torch.autograd.grad(h.sum(), weight)[0].any()


def check_ops() -> None:
    """What `torch.library` asks of an op, a full graph under `torch.compile`, and one graph for all lengths."""
    for update, norm in ((False, False), (True, True)):
        sources, weight = make_inputs((5, 24, 3), torch.float32)
        extra = torch.randn_like(sources[0]).requires_grad_() if update else None
        norm_weight = torch.randn_like(weight).requires_grad_() if norm else None
        arguments = (sources, weight, EPS, 2.0, extra, norm_weight, 1e-6)
        torch.library.opcheck(torch.ops.depthattn.attn_res_read_triton.default, arguments)
        with torch.no_grad():
            out, partial, stats = torch.ops.depthattn.attn_res_read_triton(*arguments)
            grad_partial = torch.randn_like(partial) if update else None
            read = [source.detach() for source in sources]
            torch.library.opcheck(
                torch.ops.depthattn.attn_res_read_triton_backward.default,
                (out, grad_partial, read, weight, stats, 2.0, norm_weight, [True, False, True]),
            )

    with torch.no_grad():
        sources, weight = make_inputs((5, 24, 3), torch.float32)
        h, stats = PULL_TRITON.read(sources, weight, EPS, 2.0)
        arguments = (h, [source.detach() for source in sources], weight.detach(), stats, 2.0)
        torch.library.opcheck(torch.ops.depthattn.attn_res_coefficients_triton.default, arguments)
        coefficients, _ = PULL_TRITON.coefficients(*arguments)
        for direct in (None, sources[0].detach()):
            arguments = (sources[1].detach(), direct, [h] * 2, [weight.detach()] * 2, [coefficients] * 2, [0, 2])
            torch.library.opcheck(torch.ops.depthattn.attn_res_pull_triton.default, arguments)

    def step(sources, weight, extra, norm_weight):
        h, weights = attn_res_read(sources, weight, eps=EPS, impl="triton", return_weights=True)
        out, partial, _ = fused_attn_res_read(
            sources, weight, eps=EPS, update=extra, norm_weight=norm_weight, norm_eps=EPS
        )
        return h * 2 + out, weights, partial

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 9):
        sources, weight = make_inputs((num_tokens, 24, 3), torch.float32)
        extra, norm_weight = torch.randn_like(sources[0]).requires_grad_(), torch.randn_like(weight).requires_grad_()
        results = []
        for f in (step, compiled):
            h, weights, partial = f(sources, weight, extra, norm_weight)
            leaves = [*sources, weight, extra, norm_weight]
            grads = torch.autograd.grad((h.square() + partial.square()).sum(), leaves)
            results.append((h, weights, partial, *grads))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def check_second_copy() -> None:
    """Remote code is a flat copy of the files, kernels included; it uses the ops of the first copy."""
    op = torch.ops.depthattn.attn_res_read_triton.default
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "remote_copy").mkdir()
        export_model_code(Path(folder) / "remote_copy")
        sys.path.insert(0, folder)
        copy = importlib.import_module("remote_copy.attn_res_ops")
        sys.path.remove(folder)
    assert (
        copy.attn_res_read is not attn_res_ops.attn_res_read and torch.ops.depthattn.attn_res_read_triton.default is op
    )
    sources, weight = make_inputs((5, 24, 3), torch.float32)
    results = []
    for read in (attn_res_read, with_keywords(copy.attn_res_read, copy.AttnResInputs)):
        h, _ = read(sources, weight, eps=EPS, impl="triton")
        assert OP in h.grad_fn.name()
        results.append([h, *torch.autograd.grad(h.square().sum(), [*sources, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_limits() -> None:
    """`impl="triton"` names what it cannot do; `"auto"` on a CPU stays with torch."""
    sources, weight = make_inputs((1, 8, 2), torch.float32)
    assert INTERPRETED
    for wrong, message in (
        ([source.bfloat16() for source in sources], "got torch.bfloat16"),
        ([torch.zeros(1, 8200)] * 2, "at most 8192 channels, got 8200"),
    ):
        try:
            attn_res_read(wrong, torch.zeros(wrong[0].shape[-1]), eps=EPS, impl="triton")
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error: {message}")
    h, _ = attn_res_read(sources, weight, eps=EPS, impl="auto")
    assert OP not in h.grad_fn.name()


def check_cuda_dispatch() -> None:
    """On CUDA tensors (fake ones here) the op is taken where it can be, in every dtype, with the right shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def ops_of(dtype, num_channels, impl="auto"):
        def read(*sources):
            h, weights = attn_res_read(sources[:-1], sources[-1], eps=EPS, impl=impl, return_weights=True)
            return h, weights

        with FakeTensorMode():
            sources = [torch.empty(2, 3, num_channels, device="cuda", dtype=dtype) for _ in range(3)]
            weight = torch.empty(num_channels, device="cuda")
            graph = make_fx(read)(*sources, weight)
            h, weights = graph(*sources, weight)
            assert h.shape == sources[0].shape and h.dtype == dtype and h.device.type == "cuda"
            assert weights.shape == (2, 3, 1, 3)
        return {str(node.target) for node in graph.graph.nodes}

    fast, slow = "depthattn.attn_res_read_triton.default", "depthattn.attn_res_read.default"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fast in ops_of(dtype, 24) and slow not in ops_of(dtype, 24)
        assert slow in ops_of(dtype, 24, "torch")
    assert slow in ops_of(torch.bfloat16, 8200) and slow in ops_of(torch.float64, 24)
    with FakeTensorMode():
        sources = [torch.empty(2, 3, 24, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        grads, grad_weight, _ = torch.ops.depthattn.attn_res_read_triton_backward(
            sources[0], None, sources, torch.empty(24, device="cuda"), torch.empty(6, 9, device="cuda"), 1.0, None,
            [True, False, True],
        )  # fmt: skip
        assert [grad.shape for grad in grads] == [sources[0].shape] * 2 and grad_weight.shape == (24,)


def main() -> None:
    # Memory that a kernel was to write and did not is NaN.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    assert op_dispatch.OPS["attn_res_read"].triton_impl is not None
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        name, *arguments = check.split(":")
        globals()[f"check_{name}"](*arguments)
        print(f"{check} ok")


if __name__ == "__main__":
    main()
