"""The AttnRes read: values, gradients, dispatch, and what the op promises to autograd and torch.compile."""

import dataclasses
import gc
import importlib
import sys
import zlib

import pytest
import torch
import torch._dynamo.testing
from keyword_ops import attn_res_read, attn_res_read_reference, with_keywords
from tolerances import RELATIVE_RMSE, relative_rmse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hf_depthattn import attn_res_ops, op_dispatch
from hf_depthattn.remote_code import export_model_code

EPS = 1e-6
# (tokens, channels, sources)
SHAPES = [(1, 8, 1), (5, 24, 2), (63, 123, 3), (5, 512, 5), (63, 24, 9), (5, 123, 33), (1, 512, 9), (63, 8, 5)]
OPTIONS = [
    {},
    {"read_scale": 3.0},
    {"normalize_keys": False},
    {"activation": "sigmoid"},
    {"num_depth_heads": 4},
    {"per_token": True},
    {"per_token": True, "num_depth_heads": 2, "activation": "sigmoid", "normalize_keys": False, "read_scale": 0.5},
]


@pytest.fixture
def generator(request):
    """Inputs differ from test to test and are the same in every run; a failing test prints its seed."""
    seed = zlib.crc32(request.node.name.encode())
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def make_inputs(generator, shape, dtype=torch.float32, per_token=False):
    num_tokens, num_channels, num_sources = shape
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # Sources of different sizes, as sums over blocks have; logits of order one.
    sources = [
        (torch.randn(1, num_tokens, num_channels, generator=generator, dtype=torch.float64) * (1 + i)).to(dtype)
        for i in range(num_sources)
    ]
    weight_shape = (1, num_tokens, num_channels) if per_token else (num_channels,)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64).to(weight_dtype)
    weight *= num_channels**-0.5
    return [source.requires_grad_() for source in sources], weight.requires_grad_()


def loop_read(sources, weight, *, normalize_keys=True, activation="softmax", num_depth_heads=1, read_scale=1.0):
    """One token and one head at a time, in float64, from the equations."""
    batch, num_tokens, num_channels = sources[0].shape
    width = num_channels // num_depth_heads
    out, all_weights = [], []
    for token in range(num_tokens):
        query = weight if weight.dim() == 1 else weight[0, token]
        for head in range(num_depth_heads):
            channels = slice(head * width, (head + 1) * width)
            scores = []
            for source in sources:
                v = source[0, token]
                size = ((v * v).sum() / num_channels + EPS).sqrt() if normalize_keys else 1.0
                scores.append((query[channels] * v[channels]).sum() / size)
            if activation == "softmax":
                exponentials = [(score - max(scores)).exp() for score in scores]
                probabilities = [e / sum(exponentials) for e in exponentials]
            else:
                probabilities = [2 / (1 + (-score).exp()) / len(sources) for score in scores]
            mixed = sum(p * s[0, token, channels] for p, s in zip(probabilities, sources, strict=True))
            out.append(read_scale * mixed)
            all_weights.append(torch.stack(probabilities))
    h = torch.cat(out).view(batch, num_tokens, num_channels)
    return h, torch.stack(all_weights).view(batch, num_tokens, num_depth_heads, len(sources))


def check_against_loop(read, sources, weight, generator, **options):
    """Compares output, weights and every gradient of `read` with those of the loop."""
    bound = RELATIVE_RMSE[sources[0].dtype]
    h, weights = read(sources, weight, eps=EPS, return_weights=True, **options)
    grad_h = torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype)
    grads = torch.autograd.grad(h, [*sources, weight], grad_h)

    exact_inputs = [x.detach().double().requires_grad_() for x in (*sources, weight)]
    exact_h, exact_weights = loop_read(exact_inputs[:-1], exact_inputs[-1], **options)
    exact_grads = torch.autograd.grad(exact_h, exact_inputs, grad_h.double())

    assert h.dtype == sources[0].dtype
    assert not weights.requires_grad
    assert weights.shape == exact_weights.shape
    assert relative_rmse(h, exact_h) <= bound
    # Weights are never rounded to the dtype of 16-bit sources.
    assert relative_rmse(weights, exact_weights) <= min(bound, RELATIVE_RMSE[torch.float32])
    for x, grad, exact in zip((*sources, weight), grads, exact_grads, strict=True):
        assert grad.dtype == x.dtype
        assert relative_rmse(grad, exact) <= bound


@pytest.mark.parametrize("dtype", RELATIVE_RMSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-D{0[1]}-N{0[2]}".format)
def test_fused_read_equals_loop(shape, dtype, generator):
    sources, weight = make_inputs(generator, shape, dtype)
    check_against_loop(attn_res_read, sources, weight, generator, read_scale=float(shape[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "paper")
@pytest.mark.parametrize("read", [attn_res_read, attn_res_read_reference], ids=["dispatched", "reference"])
def test_read_with_options_equals_loop(read, options, dtype, generator):
    options = dict(options)
    sources, weight = make_inputs(generator, (5, 24, 3), dtype, per_token=options.pop("per_token", False))
    check_against_loop(read, sources, weight, generator, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_tokens_equal_loop(dtype, generator, monkeypatch):
    monkeypatch.setattr(attn_res_ops, "_MIN_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(attn_res_ops, "_CHUNK_ELEMENTS_PER_THREAD", 100)
    sources, weight = make_inputs(generator, (63, 24, 3), dtype)
    check_against_loop(attn_res_read, sources, weight, generator)


def test_gradcheck(generator):
    sources, weight = make_inputs(generator, (3, 5, 4), torch.float64)

    def read(weight, *sources):
        return attn_res_read(sources, weight, eps=1e-3, read_scale=2.0)[0]

    assert torch.autograd.gradcheck(read, (weight, *sources))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_zero_query_gives_the_mean(activation, generator):
    sources, weight = make_inputs(generator, (5, 123, 9))
    h, weights = attn_res_read(sources, torch.zeros_like(weight), eps=EPS, activation=activation, return_weights=True)
    assert relative_rmse(h, torch.stack(sources).double().mean(0)) <= RELATIVE_RMSE[torch.float32]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_source_is_the_identity(dtype, generator):
    sources, weight = make_inputs(generator, (5, 24, 1), dtype)
    h, weights = attn_res_read(sources, weight, eps=EPS, return_weights=True)
    grad_source, grad_weight = torch.autograd.grad(h, (*sources, weight), torch.ones_like(h))
    assert torch.equal(h, sources[0])
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(grad_source, torch.ones_like(h))
    # A gradient of zeros, not None: DDP expects one for every parameter.
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("read", [attn_res_read, attn_res_read_reference], ids=["dispatched", "reference"])
# In float16 the gradient of a zero source, 1 / sqrt(EPS) larger than that of the others, bounds the size.
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e15), (torch.bfloat16, 1e15), (torch.float16, 1e3)])
def test_huge_and_zero_sources_stay_finite(dtype, size, read, generator):
    (source, zero, huge), weight = make_inputs(generator, (5, 24, 3), dtype)
    inputs = [source, torch.zeros_like(zero).requires_grad_(), torch.full_like(huge, size).requires_grad_()]
    h, _ = read(inputs, weight, eps=EPS)
    grads = torch.autograd.grad(h, [*inputs, weight], torch.full_like(h, 1e-3))
    assert h.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_frozen_inputs_get_no_gradient(generator):
    sources, weight = make_inputs(generator, (5, 24, 3))
    sources[1].requires_grad_(False)
    attn_res_read(sources, weight, eps=EPS)[0].sum().backward()
    assert sources[1].grad is None
    assert sources[0].grad is not None and sources[2].grad is not None and weight.grad is not None

    frozen = [source.detach() for source in sources]
    attn_res_read(frozen, weight, eps=EPS)[0].sum().backward()
    assert all(source.grad is None for source in frozen)
    assert not attn_res_read(frozen, weight.detach(), eps=EPS)[0].requires_grad


def test_one_tensor_given_twice_gets_both_gradients(generator):
    (source, other), weight = make_inputs(generator, (5, 24, 2), torch.float64)
    grads = []
    for read in (attn_res_read, attn_res_read_reference):
        h, _ = read([source, other, source], weight, eps=EPS)
        grads.append(torch.autograd.grad(h.square().sum(), [source, other, weight]))
    for fused, reference in zip(*grads, strict=True):
        torch.testing.assert_close(fused, reference)


def test_strided_sources_and_no_tokens(generator):
    sources, weight = make_inputs(generator, (6, 24, 3))
    strided = [source.detach().reshape(2, 3, 24).transpose(0, 1).requires_grad_() for source in sources]
    dense = [source.detach().contiguous().requires_grad_() for source in strided]
    grads = []
    for inputs in (strided, dense):
        h, _ = attn_res_read(inputs, weight, eps=EPS)
        grads.append(torch.autograd.grad(h.sum(), [*inputs, weight]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

    h, weights = attn_res_read([source[:, :0] for source in sources], weight, eps=EPS, return_weights=True)
    assert h.shape == (1, 0, 24) and weights.shape == (1, 0, 1, 3)


@pytest.mark.parametrize("options", [{}, {"num_depth_heads": 2}], ids=["fused", "reference"])
def test_autocast_does_not_lower_the_precision(options, generator):
    sources, weight = make_inputs(generator, (5, 24, 3))
    expected, _ = attn_res_read(sources, weight, eps=EPS, **options)
    with torch.autocast("cpu", torch.bfloat16):
        h, _ = attn_res_read(sources, weight, eps=EPS, **options)
    assert torch.equal(h, expected)


# What the op promises to torch.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, generator):
    sources, weight = make_inputs(generator, (5, 24, 3), dtype)
    sources[1].requires_grad_(False)
    torch.library.opcheck(torch.ops.depthattn.attn_res_read.default, (sources, weight, EPS, 2.0))

    sources, weight = [source.detach() for source in sources], weight.detach()
    h, logits, rstd = torch.ops.depthattn.attn_res_read(sources, weight, EPS, 2.0)
    torch.library.opcheck(
        torch.ops.depthattn.attn_res_read_backward.default,
        (h, sources, weight, logits, rstd, 2.0, [True, False, True]),
    )


def test_compile_is_one_graph_for_all_lengths(generator):
    torch.compiler.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(sources, weight):
        h, weights = attn_res_read(sources, weight, eps=EPS, return_weights=True)
        return h * 2, weights

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiles)
    for num_tokens in (5, 9, 63):
        sources, weight = make_inputs(generator, (num_tokens, 24, 3))
        results = []
        for f in (step, compiled):
            h, weights = f(sources, weight)
            results.append((h, weights, *torch.autograd.grad(h.square().sum(), [*sources, weight])))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    # torch also hands the backend an empty graph: what counts is how often the op was traced.
    traced = torch.ops.depthattn.attn_res_read
    assert len([g for g in compiles.graphs if g.graph.find_nodes(op="call_function", target=traced)]) == 1


def test_checkpoint_gives_the_same_gradients(generator):
    sources, weight = make_inputs(generator, (5, 24, 3))

    def read(*sources):
        return attn_res_read(sources, weight, eps=EPS)[0].tanh()

    plain = torch.autograd.grad(read(*sources).sum(), [*sources, weight])
    recomputed = torch.autograd.grad(checkpoint(read, *sources, use_reentrant=False).sum(), [*sources, weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_only_statistics(dtype, generator):
    num_tokens, num_sources = 63, 9
    sources, weight = make_inputs(generator, (num_tokens, 24, num_sources), dtype)
    inputs = {x.untyped_storage().data_ptr() for x in (*sources, weight)}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        h, _ = attn_res_read(sources, weight, eps=EPS)
    assert h.requires_grad and inputs <= kept.keys()
    # The logits and 1 / rms of every token and source, in float32.
    assert sum(size for key, size in kept.items() if key not in inputs) == 2 * num_sources * num_tokens * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_holds_all_sources(dtype, generator):
    class LargestResult(TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.num_elements = max([self.num_elements, *sizes])
            return result

    sources, weight = make_inputs(generator, (63, 24, 9), dtype)
    sources, weight = [source.detach() for source in sources], weight.detach()
    with LargestResult() as largest:
        h, logits, rstd = attn_res_ops._read_forward(sources, weight, EPS, 1.0)
        attn_res_ops._read_backward(h, sources, weight, logits, rstd, 1.0, [True] * 9)
    assert largest.num_elements == 63 * 24


def test_second_copy_of_the_file_shares_the_op(tmp_path, monkeypatch, generator):
    """Remote code from the Hub is a copy of the file under another module name."""
    package = tmp_path / "depthattn_remote_copy"
    package.mkdir()
    export_model_code(package)
    monkeypatch.syspath_prepend(tmp_path)
    sources, weight = make_inputs(generator, (5, 24, 3))

    def read_and_differentiate(read):
        h, _ = read(sources, weight, eps=EPS)
        assert "depthattn_attn_res_read" in h.grad_fn.name()
        return h, *torch.autograd.grad(h.sum(), [*sources, weight])

    op = torch.ops.depthattn.attn_res_read.default
    before = read_and_differentiate(attn_res_read)
    copy = importlib.import_module(f"{package.name}.attn_res_ops")
    assert copy.attn_res_read is not attn_res_ops.attn_res_read
    read_of_copy = with_keywords(copy.attn_res_read, copy.AttnResInputs)
    results = [read_and_differentiate(read_of_copy), read_and_differentiate(attn_res_read)]
    # transformers executes the file again in the same module when its text changed.
    importlib.reload(copy)
    results.append(read_and_differentiate(read_of_copy))
    del copy
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]
    gc.collect()
    results.append(read_and_differentiate(attn_res_read))
    assert torch.ops.depthattn.attn_res_read.default is op
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, before, strict=True))


# Dispatch and errors.


def test_paper_case_takes_the_op_and_options_the_reference(generator):
    sources, weight = make_inputs(generator, (5, 24, 3))
    for impl in ("auto", "torch"):
        h, _ = attn_res_read(sources, weight, eps=EPS, impl=impl)
        assert "depthattn_attn_res_read" in h.grad_fn.name()
    h, _ = attn_res_read(sources, weight, eps=EPS, num_depth_heads=2)
    assert "depthattn" not in h.grad_fn.name()


def test_triton_never_falls_back(generator, monkeypatch):
    sources, weight = make_inputs(generator, (5, 24, 3))
    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", True)
    with pytest.raises(RuntimeError, match=r"'attn_res_read' has no kernel for these inputs: .*activation='sigmoid'"):
        attn_res_read(sources, weight, eps=EPS, impl="triton", activation="sigmoid")
    row = dataclasses.replace(attn_res_ops.ATTN_RES_READ, triton_impl=None)
    monkeypatch.setitem(op_dispatch.OPS, row.name, row)
    with pytest.raises(RuntimeError, match="there is no Triton implementation of 'attn_res_read'"):
        attn_res_read(sources, weight, eps=EPS, impl="triton")
    monkeypatch.undo()
    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=r"'attn_res_read' \(the package `triton` cannot be imported"):
        attn_res_read(sources, weight, eps=EPS, impl="triton")


def test_resolve_prefers_triton_on_cuda_only(monkeypatch):
    def triton_read():
        pass

    def torch_read():
        pass

    def chosen(impl, device):
        return op_dispatch.resolve(attn_res_ops.ATTN_RES_READ, impl, torch.device(device), ())

    monkeypatch.setattr(op_dispatch, "_HAS_TRITON", True)
    monkeypatch.setitem(op_dispatch.OPS, "attn_res_read", op_dispatch.Op("attn_res_read", torch_read))
    assert chosen("auto", "cuda") is torch_read
    monkeypatch.setitem(op_dispatch.OPS, "attn_res_read", op_dispatch.Op("attn_res_read", torch_read, triton_read))
    assert chosen("auto", "cuda") is triton_read
    assert chosen("auto", "cpu") is torch_read
    assert chosen("torch", "cuda") is torch_read
    assert chosen("triton", "cpu") is triton_read


X = torch.zeros(1, 5, 24)
W = torch.zeros(24)


@pytest.mark.parametrize(
    ("sources", "weight", "options", "message"),
    [
        ([], W, {}, "`sources` must contain at least one tensor"),
        ([X.long()], W, {}, r"`sources` .*dtypes .*got torch.int64"),
        ([torch.zeros(())], W, {}, r"`sources` .*\[\.\.\., D\] with D >= 1, got \(\)"),
        ([X, X[:, :3]], W, {}, r"`sources` must have one shape, got \(1, 3, 24\) at 1 and \(1, 5, 24\) at 0"),
        ([X, X.half()], W, {}, "`sources` must have one dtype, got torch.float16 at 1 and torch.float32 at 0"),
        ([X, X], W[:23], {}, r"`score_weight` must have the shape \(24,\) .*\(1, 5, 24\), got \(23,\)"),
        ([X, X], torch.zeros(5, 24), {}, r"`score_weight` .*got \(5, 24\)"),
        ([X, X], W, {"activation": "relu"}, r"`activation` must be one of \('softmax', 'sigmoid'\), got 'relu'"),
        ([X, X], W, {"num_depth_heads": 5}, "`num_depth_heads` must be a positive divisor .* 24, got 5"),
        ([X, X], W, {"num_depth_heads": 0}, "`num_depth_heads` .*got 0"),
        ([X, X], W, {"impl": "cuda"}, r"`impl` must be one of \('auto', 'torch', 'triton'\), got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(sources, weight, options, message):
    with pytest.raises(ValueError, match=message):
        attn_res_read(sources, weight, eps=EPS, **options)


def test_function_transforms_use_the_reference():
    torch.manual_seed(0)
    sources, weight = [torch.randn(3, 8, dtype=torch.float64) for _ in range(3)], torch.randn(8, dtype=torch.float64)

    def total(read):
        return lambda *values: read(list(values[:-1]), values[-1], eps=1e-6)[0].square().sum()

    arguments = (*sources, weight)
    tangents = tuple(torch.randn_like(x) for x in arguments)
    for actual, expected in zip(
        torch.func.jvp(total(attn_res_read), arguments, tangents),
        torch.func.jvp(total(attn_res_read_reference), arguments, tangents),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_functional_transforms(generator):
    """They take the path of autograd, which has second derivatives too."""
    sources, weight = make_inputs(generator, (5, 8, 3), torch.float64)
    values = [source.detach() for source in sources]

    def total(read, w):
        return read(values, w, eps=EPS)[0].sin().sum()

    actual = torch.func.grad(lambda w: total(attn_res_read, w))(weight.detach())
    (expected,) = torch.autograd.grad(total(attn_res_read, weight), weight)
    torch.testing.assert_close(actual, expected)
    hessian = torch.func.hessian(lambda w: total(attn_res_read, w))(weight.detach())
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda w: total(attn_res_read_reference, w), weight.detach())
    )
