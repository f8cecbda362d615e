"""The kernels of the AttnRes read against the reference in float64, and what their ops promise to torch."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_inputs import DEVICE, EPS, check_close, compiled_only, doubles, in_every_dtype, read_inputs
from keyword_ops import attn_res_read, attn_res_read_reference, with_keywords
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_depthattn import attn_res_ops, op_dispatch
from hf_depthattn.kernels.row_tiles import INTERPRETED
from hf_depthattn.remote_code import export_model_code

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
OP = "attn_res_plain_read_triton"
label_of = "T{0[0]}-D{0[1]}-N{0[2]}".format


@pytest.mark.parametrize("shape", SHAPES, ids=label_of)
@in_every_dtype
def test_parity(shape, dtype):
    """Values, weights and every gradient equal those of the reference in float64."""
    sources, weight = read_inputs(shape, dtype)
    options = {"eps": EPS, "read_scale": float(shape[2]), "return_weights": True}
    h, weights = attn_res_read(sources, weight, impl="triton", **options)
    assert OP in h.grad_fn.name() and h.dtype == dtype and not weights.requires_grad
    grad_h = torch.randn_like(h)
    grads = torch.autograd.grad(h, [*sources, weight], grad_h)
    *exact_sources, exact_weight = exact = doubles([*sources, weight])
    exact_h, exact_weights = attn_res_read_reference(exact_sources, exact_weight, **options)
    exact_grads = torch.autograd.grad(exact_h, exact, grad_h.double())
    check_close("read", dtype, [h, weights, *grads], [exact_h, exact_weights, *exact_grads])
    assert weights.dtype == weight.dtype and weights.shape == exact_weights.shape
    if shape[2] == 1:
        assert torch.equal(h, sources[0]) and torch.equal(grads[0], grad_h) and not grads[1].any()


@pytest.mark.interpreted
def test_frozen_inputs_get_no_gradient():
    sources, weight = read_inputs((5, 24, 3), torch.float32)
    sources[1].requires_grad_(False)
    h, _ = attn_res_read(sources, weight, eps=EPS, impl="triton")
    h.sum().backward()
    assert sources[1].grad is None and sources[0].grad is not None and weight.grad is not None
    frozen = [source.detach() for source in sources]
    assert not attn_res_read(frozen, weight.detach(), eps=EPS, impl="triton")[0].requires_grad


@pytest.mark.interpreted
def test_bits_are_the_same_every_time_and_for_views():
    sources, weight = read_inputs((63, 24, 3), torch.float32)
    results = []
    for _ in range(2):
        h, _ = attn_res_read(sources, weight, eps=EPS, impl="triton")
        results.append([h, *torch.autograd.grad(h.square().sum(), [*sources, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    views = [source.transpose(0, 1) for source in sources]
    h, _ = attn_res_read(views, weight, eps=EPS, impl="triton")
    assert torch.equal(h, results[0][0].transpose(0, 1))


@pytest.mark.interpreted
def test_no_tokens():
    _, weight = read_inputs((63, 24, 3), torch.float32)
    empty = [torch.zeros(0, 24, device=DEVICE, requires_grad=True) for _ in range(3)]
    h, _ = attn_res_read(empty, weight, eps=EPS, impl="triton")
    assert h.shape == (0, 24)
    assert not torch.autograd.grad(h.sum(), weight)[0].any()


@pytest.mark.interpreted
def test_opcheck():
    sources, weight = read_inputs((5, 24, 3), torch.float32)
    arguments = (sources, weight, EPS, 2.0)
    torch.library.opcheck(torch.ops.depthattn.attn_res_plain_read_triton.default, arguments)
    with torch.no_grad():
        out, stats = torch.ops.depthattn.attn_res_plain_read_triton(*arguments)
        read = [source.detach() for source in sources]
        torch.library.opcheck(
            torch.ops.depthattn.attn_res_plain_read_triton_backward.default,
            (out, read, weight, stats, 2.0, [True, False, True]),
        )


@pytest.mark.interpreted
def test_compiles_to_one_graph_for_all_lengths():
    def step(sources, weight):
        h, weights = attn_res_read(sources, weight, eps=EPS, impl="triton", return_weights=True)
        return h * 2, weights

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 9):
        sources, weight = read_inputs((num_tokens, 24, 3), torch.float32)
        results = []
        for f in (step, compiled):
            h, weights = f(sources, weight)
            results.append((h, weights, *torch.autograd.grad(h.square().sum(), [*sources, weight])))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.interpreted
def test_second_copy_uses_the_ops_of_the_first(tmp_path, monkeypatch):
    """Remote code is a flat copy of the files, kernels included."""
    op = torch.ops.depthattn.attn_res_plain_read_triton.default
    (tmp_path / "remote_copy").mkdir()
    export_model_code(tmp_path / "remote_copy")
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("remote_copy.attn_res_ops")
    assert copy.attn_res_read is not attn_res_ops.attn_res_read
    assert torch.ops.depthattn.attn_res_plain_read_triton.default is op
    sources, weight = read_inputs((5, 24, 3), torch.float32)
    results = []
    for read in (attn_res_read, with_keywords(copy.attn_res_read, copy.AttnResInputs)):
        h, _ = read(sources, weight, eps=EPS, impl="triton")
        assert OP in h.grad_fn.name()
        results.append([h, *torch.autograd.grad(h.square().sum(), [*sources, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.bfloat16), "got torch.bfloat16"),
        (torch.zeros(1, 8200), "at most 8192 channels, got 8200"),
    ],
    ids=["bfloat16", "too many channels"],
)
def test_what_cannot_be_done_is_named(source, message):
    assert INTERPRETED
    with pytest.raises(RuntimeError, match=message):
        attn_res_read([source] * 2, torch.zeros(source.shape[-1]), eps=EPS, impl="triton")


@pytest.mark.interpreted
def test_auto_on_a_cpu_stays_with_torch():
    sources, weight = read_inputs((1, 8, 2), torch.float32)
    h, _ = attn_res_read(sources, weight, eps=EPS, impl="auto")
    assert OP not in h.grad_fn.name()


def ops_of(dtype: torch.dtype, num_channels: int, impl: str = "auto") -> set[str]:
    """Ops of a read on CUDA tensors, fake ones."""

    def read(*sources):
        return attn_res_read(sources[:-1], sources[-1], eps=EPS, impl=impl, return_weights=True)

    with FakeTensorMode():
        sources = [torch.empty(2, 3, num_channels, device="cuda", dtype=dtype) for _ in range(3)]
        weight = torch.empty(num_channels, device="cuda")
        graph = make_fx(read)(*sources, weight)
        h, weights = graph(*sources, weight)
        assert h.shape == sources[0].shape and h.dtype == dtype and h.device.type == "cuda"
        assert weights.shape == (2, 3, 1, 3)
    return {str(node.target) for node in graph.graph.nodes}


@compiled_only
def test_cuda_tensors_take_the_kernels():
    assert op_dispatch.OPS["attn_res_read"].triton_impl is not None
    fast, slow = "depthattn.attn_res_plain_read_triton.default", "depthattn.attn_res_read.default"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fast in ops_of(dtype, 24) and slow not in ops_of(dtype, 24)
        assert slow in ops_of(dtype, 24, "torch")
    assert slow in ops_of(torch.bfloat16, 8200) and slow in ops_of(torch.float64, 24)


@compiled_only
def test_backward_has_the_right_shapes_on_cuda_tensors():
    with FakeTensorMode():
        sources = [torch.empty(2, 3, 24, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        grads, grad_weight = torch.ops.depthattn.attn_res_plain_read_triton_backward(
            sources[0], sources, torch.empty(24, device="cuda"), torch.empty(6, 8, device="cuda"), 1.0,
            [True, False, True],
        )  # fmt: skip
        assert [grad.shape for grad in grads] == [sources[0].shape] * 2 and grad_weight.shape == (24,)
