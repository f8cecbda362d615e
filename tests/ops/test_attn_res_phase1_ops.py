"""Phase 1 of grouped AttnRes reads: values and every gradient, and what the op promises to autograd and compilers."""

import itertools
import zlib

import pytest
import torch
from group_reads import DTYPES, EPS, assert_like, doubles, draw, sum_dtype, upstream
from keyword_ops import attn_res_read_reference

from hf_depthattn import attn_res_phase1_ops, attn_res_phase1_torch, op_dispatch
from hf_depthattn.attn_res_phase1_ops import attn_res_phase1, attn_res_phase1_reference

# (tokens, channels, sources, reads)
SHAPES = [(1, 8, 1, 1), (5, 24, 2, 3), (63, 123, 3, 2), (7, 512, 5, 6), (21, 24, 13, 4), (5, 3, 3, 2)]


@pytest.fixture(autouse=True)
def seed(request):
    """Inputs differ from test to test and are the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def make_inputs(shape, dtype=torch.float64):
    num_tokens, channels, num_sources, num_reads = shape
    sources = [draw(1, num_tokens, channels, dtype=dtype, scale=1 + i / 4) for i in range(num_sources)]
    return sources, draw(num_reads, channels, dtype=sum_dtype(dtype), scale=channels**-0.5)


def flat(results):
    outs, lses, _ = results
    return [*outs, *lses]


def exact_results(sources, weights):
    outs, lses = attn_res_phase1_reference(sources, weights, eps=EPS)
    return [*outs, *lses]


@pytest.fixture(params=[True, False], ids=["passes_sources", ""])
def passes_sources(request, monkeypatch):
    """Both ways of adding the gradients of later uses: in the op's backward, and by autograd."""
    op = attn_res_phase1_ops.ATTN_RES_PHASE1
    row = op_dispatch.Op(op.name, op.torch_impl._replace(passes_sources=request.param))
    monkeypatch.setitem(op_dispatch.OPS, op.name, row)
    return request.param


@pytest.fixture(autouse=True, params=["gathered", "one by one"])
def form(request, monkeypatch):
    """Both forms of forward and backward, whatever the size."""
    is_gathered = request.param == "gathered"
    monkeypatch.setattr(attn_res_phase1_torch, "_GATHERED_ELEMENTS", 1 << 40 if is_gathered else 0)
    monkeypatch.setattr(attn_res_phase1_torch, "_FEW_READS", 0 if is_gathered else 99)


@pytest.fixture
def chunks_of_four_tokens(monkeypatch):
    def chunks(like, *_):
        return (slice(start, start + 4) for start in range(0, like.numel() // like.shape[-1], 4))

    monkeypatch.setattr(attn_res_phase1_torch, "_chunks", chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    sources, weights = make_inputs(shape, dtype)
    actual = flat(attn_res_phase1(sources, weights, eps=EPS))
    wanted = doubles([*sources, weights])
    exact = exact_results(wanted[:-1], wanted[-1])
    gradients = upstream(actual)
    assert_like(actual, exact, dtype)
    of_inputs = torch.autograd.grad(actual, [*sources, weights], gradients)
    of_exact = torch.autograd.grad(exact, wanted, [g.double() for g in gradients])
    # The gradient of the weights is a sum over tokens with cancellations.
    assert_like(of_inputs, of_exact, dtype, factor=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_result(dtype, chunks_of_four_tokens):
    test_values_and_gradients((21, 24, 5, 3), dtype)


def test_a_read_of_phase_1_is_a_read():
    sources, weights = make_inputs((9, 16, 4, 3))
    outs, _, _ = attn_res_phase1(sources, weights, eps=EPS)
    for out, weight in zip(outs, weights, strict=True):
        assert_like([out], [attn_res_read_reference(sources, weight, eps=EPS)[0]], torch.float64)


def test_gradients_of_later_uses_are_added(passes_sources, chunks_of_four_tokens):
    sources, weights = make_inputs((9, 16, 3, 2))

    def total(through, outs, lses):
        later = sum((i + 1) * source.sin().sum() for i, source in enumerate(through[:2]))
        return later + sum(out.cos().sum() for out in outs) + sum(lse.square().sum() for lse in lses)

    outs, lses, through = attn_res_phase1(sources, weights, eps=EPS)
    assert all(torch.equal(a, b) for a, b in zip(through, sources, strict=True))
    assert all((a is b) != passes_sources for a, b in zip(through, sources, strict=True))
    actual = torch.autograd.grad(total(through, outs, lses), [*sources, weights])
    expected = torch.autograd.grad(
        total(sources, *attn_res_phase1_reference(sources, weights, eps=EPS)), [*sources, weights]
    )
    assert_like(actual, expected, torch.float64)


@pytest.mark.parametrize("used", [[0], [1, 3], [4], [2, 5]], ids=str)
def test_unused_results(used, passes_sources):
    sources, weights = make_inputs((9, 16, 4, 3))
    results = flat(attn_res_phase1(sources, weights, eps=EPS))
    exact = exact_results(sources, weights)
    actual = torch.autograd.grad(sum(results[i].sin().sum() for i in used), [*sources, weights])
    expected = torch.autograd.grad(sum(exact[i].sin().sum() for i in used), [*sources, weights])
    assert_like(actual, expected, torch.float64)


def test_only_later_uses(passes_sources):
    sources, weights = make_inputs((9, 16, 2, 3))
    _, _, through = attn_res_phase1(sources, weights, eps=EPS)
    gradients = torch.autograd.grad(through[1].sum(), [*sources, weights], allow_unused=True)
    assert gradients[2] is None and torch.equal(gradients[1], torch.ones_like(sources[1]))


@pytest.mark.parametrize("frozen", [{0}, {1, 2}, {3}, {0, 1, 2}], ids=str)
def test_frozen_inputs(frozen, passes_sources):
    sources, weights = make_inputs((9, 16, 3, 2))
    inputs = [*sources, weights]
    for i in frozen:
        inputs[i].requires_grad_(False)
    trained = [x for x in inputs if x.requires_grad]
    outs, lses, through = attn_res_phase1(sources, weights, eps=EPS)
    assert [x.requires_grad for x in through] == [x.requires_grad for x in sources]
    actual = torch.autograd.grad(sum(x.sin().sum() for x in (*outs, *lses)), trained)
    exact = exact_results(sources, weights)
    assert_like(actual, torch.autograd.grad(sum(x.sin().sum() for x in exact), trained), torch.float64)


def test_nothing_is_kept_without_gradients():
    sources, weights = make_inputs((9, 16, 3, 2))
    with torch.no_grad():
        outs, lses, through = attn_res_phase1(sources, weights, eps=EPS)
    assert not any(x.requires_grad for x in (*outs, *lses)) and through == tuple(sources)
    assert_like([*outs, *lses], exact_results(sources, weights), torch.float64)


def test_any_layout_and_number_of_dimensions():
    sources = [draw(16, 2, 5).permute(1, 2, 0), draw(2, 5, 32)[..., ::2], draw(1, 5, 16).expand(2, 5, 16)]
    weights = draw(16, 3).t()
    for first in (sources, [source[0] for source in sources], [source[0, 0] for source in sources]):
        inputs = [x.detach().requires_grad_() for x in (*first, weights)]
        results, exact = (
            flat(attn_res_phase1(inputs[:-1], inputs[-1], eps=EPS)),
            exact_results(inputs[:-1], inputs[-1]),
        )
        gradients = upstream(results)
        assert_like(results, exact, torch.float64)
        actual = torch.autograd.grad(results, inputs, gradients)
        assert_like(actual, torch.autograd.grad(exact, inputs, gradients), torch.float64)


def test_no_tokens():
    sources, weights = make_inputs((0, 8, 3, 2))
    outs, lses, _ = attn_res_phase1(sources, weights, eps=EPS)
    assert [x.shape for x in (*outs, *lses)] == [(1, 0, 8)] * 2 + [(0,)] * 2
    *of_sources, of_weights = torch.autograd.grad(sum(x.sum() for x in (*outs, *lses)), [*sources, weights])
    assert all(gradient.shape == (1, 0, 8) for gradient in of_sources)
    assert torch.equal(of_weights, torch.zeros_like(weights))


def test_second_derivatives_are_refused(passes_sources):
    sources, weights = make_inputs((5, 8, 2, 2))
    outs, _, _ = attn_res_phase1(sources, weights, eps=EPS)
    for gradient in torch.autograd.grad(outs[0].sum(), [*sources, weights], create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            gradient.square().sum().backward(retain_graph=True)


def test_derivatives_by_incoming_gradients_are_refused():
    sources, weights = make_inputs((5, 8, 2, 2))
    outs, lses, _ = attn_res_phase1(sources, weights, eps=EPS)
    incoming = [torch.randn_like(result, requires_grad=True) for result in (*outs, *lses)]
    gradients = torch.autograd.grad([*outs, *lses], [*sources, weights], incoming, create_graph=True)
    for gradient in incoming:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad([g.sum() for g in gradients], gradient, retain_graph=True, allow_unused=True)


def test_autocast_does_not_round():
    sources, weights = make_inputs((5, 8, 2, 2), torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = flat(attn_res_phase1(sources, weights, eps=EPS))
            results.append([*found, *torch.autograd.grad(sum(x.sin().sum() for x in found), [*sources, weights])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_breaks(dtype):
    sources, weights = make_inputs((5, 8, 3, 2), dtype)

    def run(*inputs):
        return flat(attn_res_phase1(inputs[:-1], inputs[-1], eps=EPS))

    inputs = [*sources, weights]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = upstream(run(*inputs))
    expected, actual = run(*inputs), compiled(*inputs)
    expected += torch.autograd.grad(expected, inputs, gradients)
    actual += torch.autograd.grad(actual, inputs, gradients)
    assert_like(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    sources, weights = make_inputs((5, 8, 3, 2), dtype)
    torch.library.opcheck(torch.ops.depthattn.attn_res_group_phase1.default, (sources, weights, EPS))
    ops = torch.ops.depthattn
    with torch.no_grad():
        outs, lse, logits, rstd = ops.attn_res_group_phase1(sources, weights, EPS)
        for grad_lse in (None, torch.randn_like(lse)):
            given = ([torch.randn_like(out) for out in outs], grad_lse, sources, weights.detach(), lse, logits, rstd)
            torch.library.opcheck(ops.attn_res_group_phase1_backward.default, given)


def test_an_exported_program_has_no_ops_of_this_package():
    sources, weights = make_inputs((5, 8, 3, 2), torch.float32)

    class Reads(torch.nn.Module):
        def forward(self, sources, weights):
            return flat(attn_res_phase1(sources, weights, eps=EPS))

    program = torch.export.export(Reads(), ([x.detach() for x in sources], weights.detach()))
    assert "depthattn" not in str(program.graph)
    assert_like(program.module()(sources, weights), exact_results(sources, weights), torch.float32)


def test_functional_transforms():
    sources, weights = make_inputs((5, 8, 3, 2))
    values = [x.detach() for x in (*sources, weights)]

    def total(*inputs):
        return sum(x.sin().sum() for x in flat(attn_res_phase1(inputs[:-1], inputs[-1], eps=EPS)))

    inputs = [*sources, weights]
    actual = torch.func.grad(total, argnums=tuple(range(4)))(*values)
    assert_like(actual, torch.autograd.grad(total(*inputs), inputs), torch.float64)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([], torch.zeros(2, 4), "at least one tensor"),
        ([torch.zeros(3, 4).int()], torch.zeros(2, 4), "dtypes.*got torch.int32"),
        ([torch.zeros(3, 4), torch.zeros(2, 4)], torch.zeros(2, 4), r"one shape and dtype, got \(2, 4\)"),
        ([torch.zeros(3, 4), torch.zeros(3, 4).double()], torch.zeros(2, 4), "got .*torch.float64 at 1"),
        ([torch.zeros(3, 4)], torch.zeros(4), r"\[reads, D\].*got \(4,\)"),
        ([torch.zeros(3, 4)], torch.zeros(2, 5), r"\[reads, D\].*got \(2, 5\)"),
        ([torch.zeros(3, 4)], torch.zeros(0, 4), r"at least one read, got \(0, 4\)"),
        ([torch.zeros(())], torch.zeros(2, 4), r"\[reads, D\].*sources \(\)"),
        ([torch.zeros(3, 0)], torch.zeros(2, 0), "D >= 1"),
    ],
)
def test_refused_inputs(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        attn_res_phase1(sources, weights, eps=EPS)


def test_the_dispatched_implementation_runs(monkeypatch):
    calls = itertools.count()
    op = attn_res_phase1_ops.ATTN_RES_PHASE1

    def forward(inputs):
        next(calls)
        return op.torch_impl.forward(inputs)

    monkeypatch.setitem(op_dispatch.OPS, op.name, op_dispatch.Op(op.name, op.torch_impl._replace(forward=forward)))
    attn_res_phase1(*make_inputs((3, 4, 2, 2)), eps=EPS)
    assert next(calls) == 1
    with pytest.raises(RuntimeError, match="attn_res_phase1"):
        attn_res_phase1(*make_inputs((3, 4, 2, 2)), eps=EPS, impl="triton")
