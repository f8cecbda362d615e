"""Phase 2 of grouped AttnRes reads: values and every gradient, and what the op promises to autograd and compilers."""

import zlib

import pytest
import torch
from group_reads import DTYPES, EPS, assert_like, doubles, draw, sum_dtype, upstream
from keyword_ops import attn_res_read_reference

from hf_depthattn import attn_res_phase2_ops, attn_res_phase2_torch, op_dispatch
from hf_depthattn.attn_res_phase1_ops import attn_res_phase1
from hf_depthattn.attn_res_phase2_ops import attn_res_phase2, attn_res_phase2_reference
from hf_depthattn.kernels.attn_res_group_inputs import Phase2Inputs

# (tokens, channels, sources)
SHAPES = [(1, 16, 1), (63, 123, 1), (7, 512, 2), (21, 24, 13), (5, 3, 3)]
CASES = {
    "mean": {"read_scale": 1.0, "has_update": True, "has_prior": True},
    "sum": {"read_scale": 3.0, "has_update": True, "has_prior": True},
    "no update": {"read_scale": 3.0, "has_update": False, "has_prior": True},
    "no prior": {"read_scale": 2.0, "has_update": True, "has_prior": False},
    "neither": {"read_scale": 1.0, "has_update": False, "has_prior": False},
}


@pytest.fixture(autouse=True)
def seed(request):
    """Inputs differ from test to test and are the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def make_inputs(shape, dtype=torch.float64, *, read_scale=1.0, has_update=True, has_prior=True):
    num_tokens, channels, num_sources = shape
    update = draw(1, num_tokens, channels, dtype=dtype) if has_update else None
    prior = (draw(1, num_tokens, channels, dtype=dtype), draw(num_tokens, dtype=sum_dtype(dtype)))
    sources = tuple(draw(1, num_tokens, channels, dtype=dtype, scale=1 + i / 4) for i in range(num_sources))
    weight = draw(channels, dtype=sum_dtype(dtype), scale=channels**-0.5)
    return Phase2Inputs(sources, weight, EPS, read_scale, update, *(prior if has_prior else (None, None)))


def tensors_of(inputs):
    named = (inputs.score_weight, inputs.update, inputs.prior_out, inputs.prior_lse)
    return [*inputs.sources, *(x for x in named if x is not None)]


def with_tensors(inputs, tensors):
    remaining = iter(tensors)
    sources = tuple(next(remaining) for _ in inputs.sources)
    names = ("score_weight", "update", "prior_out", "prior_lse")
    given = {name: next(remaining) for name in names if getattr(inputs, name) is not None}
    return inputs._replace(sources=sources, **given)


def flat(result):
    h, through = result
    return [h, *through]


@pytest.fixture(params=["gathered", "one by one", "chunks"])
def form(request, monkeypatch):
    """The forms of a read of several sources: for few elements, for many, and for more than one chunk."""
    if request.param != "gathered":
        monkeypatch.setattr(attn_res_phase2_torch, "_GATHERED_ELEMENTS", 0)
    if request.param == "chunks":
        monkeypatch.setattr(attn_res_phase2_torch, "_chunk_size", lambda _: 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, case, dtype, form):
    inputs = make_inputs(shape, dtype, **CASES[case])
    results = flat(attn_res_phase2(inputs))
    tensors = tensors_of(inputs)
    wanted = doubles(tensors)
    exact = flat(attn_res_phase2_reference(with_tensors(inputs, wanted)))
    if dtype in (torch.bfloat16, torch.float16) and inputs.update is not None:
        # The sum with the update is rounded before it is read.
        rounded = results[-1].detach().double()
        exact_inputs = with_tensors(inputs, wanted)
        newest = exact_inputs.sources[-1] + exact_inputs.update
        newest = newest + (rounded - newest).detach()
        exact_inputs = exact_inputs._replace(sources=(*exact_inputs.sources[:-1], newest), update=None)
        exact = flat(attn_res_phase2_reference(exact_inputs))
    gradients = upstream(results)
    assert_like(results, exact, dtype)
    actual = torch.autograd.grad(results, tensors, gradients)
    # Gradients of the weight and of the log-sum-exp are sums with cancellations.
    assert_like(actual, torch.autograd.grad(exact, wanted, [g.double() for g in gradients]), dtype, factor=8)


@pytest.mark.parametrize("num_sources", [1, 3])
@pytest.mark.parametrize("read_scale", [1.0, 5.0])
def test_both_phases_are_one_read(num_sources, read_scale, form):
    finished, update = [draw(2, 9, 16) for _ in range(4)], draw(2, 9, 16)
    newer, weights = [draw(2, 9, 16) for _ in range(num_sources)], draw(3, 16)
    outs, lses, through = attn_res_phase1(finished, weights, eps=EPS)
    inputs = [*finished, *newer, weights, update]
    actual, expected = [], []
    for k in range(3):
        h, _ = attn_res_phase2(Phase2Inputs(newer, weights[k], EPS, read_scale, update, outs[k], lses[k]))
        actual.append(h)
        sources = [*finished, *newer[:-1], newer[-1] + update]
        expected.append(attn_res_read_reference(sources, weights[k], eps=EPS, read_scale=read_scale)[0])
    gradients = upstream(expected)
    assert_like(actual, expected, torch.float64)
    assert len(through) == 4
    of_inputs = torch.autograd.grad(actual, inputs, gradients)
    assert_like(of_inputs, torch.autograd.grad(expected, inputs, gradients), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_near_one_or_zero_keeps_its_gradients(dtype):
    inputs = make_inputs((9, 16, 1), dtype, has_update=False)
    for lse in (-8.0, 8.0):
        inputs = inputs._replace(prior_lse=torch.full((9,), lse, requires_grad=True))
        tensors = tensors_of(inputs)
        h, _ = attn_res_phase2(inputs)
        wanted = doubles(tensors)
        exact, _ = attn_res_phase2_reference(with_tensors(inputs, wanted))
        gradients = upstream([h])
        actual = torch.autograd.grad(h, tensors, gradients)
        expected = torch.autograd.grad(exact, wanted, gradients[0].double())
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).norm() <= (1e-3 if dtype == torch.float32 else 2e-2) * b.norm()


def test_the_update_is_added_and_sources_pass_through(form):
    inputs = make_inputs((9, 16, 3))
    _, through = attn_res_phase2(inputs)
    assert torch.equal(through[-1], inputs.sources[-1] + inputs.update)
    assert all(torch.equal(a, b) for a, b in zip(through[:-1], inputs.sources[:-1], strict=True))


def test_gradients_of_later_uses_are_added(form):
    for num_sources in (1, 3):
        inputs = make_inputs((9, 16, num_sources), read_scale=2.0)
        tensors = tensors_of(inputs)
        totals = []
        for run in (attn_res_phase2, attn_res_phase2_reference):
            h, through = run(inputs)
            totals.append(h.sin().sum() + through[-1].cos().sum() + 3 * through[0].square().sum())
        actual, expected = (torch.autograd.grad(total, tensors) for total in totals)
        assert_like(actual, expected, torch.float64)


def test_only_later_uses():
    inputs = make_inputs((9, 16, 2))
    _, through = attn_res_phase2(inputs)
    given = [*inputs.sources, inputs.update, inputs.score_weight, inputs.prior_out]
    gradients = torch.autograd.grad(through[1].sum(), given, allow_unused=True)
    ones = torch.ones_like(inputs.update)
    assert torch.equal(gradients[1], ones) and torch.equal(gradients[2], ones)
    assert gradients[0] is gradients[3] is gradients[4] is None


@pytest.mark.parametrize("num_sources", [1, 3])
def test_frozen_inputs(num_sources, form):
    for frozen in ([0], [num_sources], [num_sources - 1, num_sources + 1], [num_sources + 2, num_sources + 3]):
        inputs = make_inputs((9, 16, num_sources))
        tensors = tensors_of(inputs)
        for i in frozen:
            tensors[i].requires_grad_(False)
        trained = [x for x in tensors if x.requires_grad]
        h, through = attn_res_phase2(inputs)
        exact, exact_through = attn_res_phase2_reference(inputs)
        assert [x.requires_grad for x in through] == [x.requires_grad for x in exact_through]
        actual = torch.autograd.grad(h.sin().sum(), trained)
        assert_like(actual, torch.autograd.grad(exact.sin().sum(), trained), torch.float64)


def test_nothing_is_kept_without_gradients(form):
    for num_sources in (1, 2):
        inputs = make_inputs((9, 16, num_sources))
        with torch.no_grad():
            results = flat(attn_res_phase2(inputs))
        assert not results[0].requires_grad and not results[-1].requires_grad
        assert_like(results, flat(attn_res_phase2_reference(inputs)), torch.float64)


@pytest.mark.parametrize("num_sources", [1, 2])
def test_any_layout_and_number_of_dimensions(num_sources, form):
    given = [draw(16, 2, 5).permute(1, 2, 0), draw(1, 5, 16).expand(2, 5, 16), draw(2, 5, 32)[..., ::2]]
    given += [draw(2, 5, 16) for _ in range(num_sources - 1)]
    weight, lse = draw(16, 2)[:, 0], draw(10, 2)[:, 0]
    for tensors in ([*given, lse], [*(x[0] for x in given), lse[:5]], [*(x[0, 0] for x in given), lse[:1]]):
        leaves = [x.detach().requires_grad_() for x in (*tensors, weight)]
        prior, update, *sources, prior_lse, score_weight = leaves
        inputs = Phase2Inputs(sources, score_weight, EPS, 2.0, update, prior, prior_lse)
        results, exact = flat(attn_res_phase2(inputs)), flat(attn_res_phase2_reference(inputs))
        gradients = [torch.randn(x.shape[-1:], dtype=x.dtype).expand(x.shape) for x in results]
        assert_like(results, exact, torch.float64)
        actual = torch.autograd.grad(results, leaves, gradients)
        assert_like(actual, torch.autograd.grad(exact, leaves, gradients), torch.float64, factor=8)


@pytest.mark.parametrize("num_sources", [1, 2])
def test_no_tokens(num_sources, form):
    inputs = make_inputs((0, 8, num_sources))
    h, _ = attn_res_phase2(inputs)
    assert h.shape == (1, 0, 8)
    gradients = torch.autograd.grad(h.sum(), tensors_of(inputs))
    assert [g.shape for g in gradients] == [x.shape for x in tensors_of(inputs)]
    assert torch.equal(gradients[num_sources], torch.zeros_like(inputs.score_weight))


@pytest.mark.parametrize("num_sources", [1, 2])
def test_second_derivatives_are_refused(num_sources):
    inputs = make_inputs((5, 8, num_sources))
    h, _ = attn_res_phase2(inputs)
    for gradient in torch.autograd.grad(h.sum(), tensors_of(inputs), create_graph=True):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("num_sources", [1, 3])
def test_derivatives_by_incoming_gradients_are_refused(num_sources):
    """As forward-mode derivatives by two backward passes take them; a gradient of zero would be wrong in silence."""
    inputs = make_inputs((5, 8, num_sources))
    results = flat(attn_res_phase2(inputs))
    incoming = [torch.randn_like(result, requires_grad=True) for result in results]
    gradients = torch.autograd.grad(results, tensors_of(inputs), incoming, create_graph=True)
    for gradient in incoming:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad([g.sum() for g in gradients], gradient, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("num_sources", [1, 2])
def test_autocast_does_not_round(num_sources, form):
    inputs = make_inputs((5, 8, num_sources), torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = flat(attn_res_phase2(inputs))
            results.append([*found, *torch.autograd.grad(found[0].sin().sum(), tensors_of(inputs))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_sources", [1, 2])
def test_compiled_without_breaks(num_sources, case, dtype):
    inputs = make_inputs((5, 8, num_sources), dtype, **CASES[case])
    tensors = tensors_of(inputs)

    def run(*given):
        return flat(attn_res_phase2(with_tensors(inputs, given)))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*tensors), compiled(*tensors)
    gradients = upstream(expected)
    expected += torch.autograd.grad(expected, tensors, gradients)
    actual += torch.autograd.grad(actual, tensors, gradients)
    # Autograd adds gradients of later uses after the op has rounded its own.
    assert_like(actual, expected, dtype, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_sources", "has_prior"), [(1, True), (1, False), (3, True)])
def test_opcheck(num_sources, has_prior, dtype):
    ops = torch.ops.depthattn
    inputs = make_inputs((5, 8, num_sources), dtype, has_update=False, has_prior=has_prior)
    sources, weight, prior, lse = list(inputs.sources), inputs.score_weight, inputs.prior_out, inputs.prior_lse
    torch.library.opcheck(ops.attn_res_group_phase2.default, (sources, weight, EPS, 2.0, prior, lse))
    with torch.no_grad():
        h, stats = ops.attn_res_group_phase2(sources, weight, EPS, 2.0, prior, lse)
        keeps_read = not has_prior or dtype == torch.float32
        kept = h if keeps_read else prior.detach()
        given = (torch.randn_like(h), [x.detach() for x in sources], weight.detach(), 2.0, stats, kept, keeps_read)
        torch.library.opcheck(ops.attn_res_group_phase2_backward.default, (*given, has_prior))


@pytest.mark.parametrize("num_sources", [1, 2])
def test_an_exported_program_has_no_ops_of_this_package(num_sources):
    inputs = make_inputs((5, 8, num_sources), torch.float32)

    class Read(torch.nn.Module):
        def forward(self, *tensors):
            return flat(attn_res_phase2(with_tensors(inputs, tensors)))

    values = tuple(x.detach() for x in tensors_of(inputs))
    program = torch.export.export(Read(), values)
    assert "depthattn" not in str(program.graph)
    assert_like(program.module()(*values), flat(attn_res_phase2_reference(inputs)), torch.float32)


def test_functional_transforms():
    inputs = make_inputs((5, 8, 2))
    tensors = tensors_of(inputs)

    def total(*given):
        return sum(x.sin().sum() for x in flat(attn_res_phase2(with_tensors(inputs, given))))

    actual = torch.func.grad(total, argnums=tuple(range(len(tensors))))(*(x.detach() for x in tensors))
    assert_like(actual, torch.autograd.grad(total(*tensors), tensors), torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "at least one tensor"),
        ({"sources": (torch.zeros(3, 4).int(),)}, "dtypes.*got torch.int32"),
        ({"sources": (torch.zeros(3, 4), torch.zeros(2, 4))}, r"`sources` must have the shape.*got \(2, 4\)"),
        ({"update": torch.zeros(2, 4)}, r"`update` must have the shape.*got \(2, 4\)"),
        ({"prior_out": torch.zeros(3, 4).double()}, r"`prior_out` must have.*got \(3, 4\) torch.float64"),
        ({"score_weight": torch.zeros(5)}, r"`score_weight` must have the shape \[D\].*got \(5,\)"),
        ({"prior_lse": torch.zeros(2)}, r"`prior_lse` must have the shape \[tokens\].*got \(2,\)"),
        ({"prior_lse": torch.zeros(3, 1)}, r"`prior_lse` must have the shape \[tokens\].*got \(3, 1\)"),
        ({"prior_lse": None}, "given together"),
        ({"prior_out": None}, "given together"),
    ],
)
def test_refused_inputs(changes, message):
    given = Phase2Inputs(
        (torch.zeros(3, 4),), torch.zeros(4), EPS, 1.0, torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3)
    )
    with pytest.raises(ValueError, match=message):
        attn_res_phase2(given._replace(**changes))


def test_the_dispatched_implementation_runs(monkeypatch):
    calls = []
    op = attn_res_phase2_ops.ATTN_RES_PHASE2

    def forward(inputs):
        calls.append(len(inputs.sources))
        return op.torch_impl.forward(inputs)

    monkeypatch.setitem(op_dispatch.OPS, op.name, op_dispatch.Op(op.name, op.torch_impl._replace(forward=forward)))
    attn_res_phase2(make_inputs((3, 4, 2)))
    assert calls == [2]
    with pytest.raises(RuntimeError, match="attn_res_phase2"):
        attn_res_phase2(make_inputs((3, 4, 2)), impl="triton")
