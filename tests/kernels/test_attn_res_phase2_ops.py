"""The kernels of phase 2 of grouped reads against the reference in float64, their ops, and their binaries."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from compiled_kernels import CompiledLaunches, Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import EPS, TARGETS, binary_cases, check_close, compiled_only, doubles, draw, in_every_dtype, wide
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_depthattn.attn_res_phase2_ops import attn_res_phase2_reference
from hf_depthattn.kernels import attn_res_ops
from hf_depthattn.kernels import attn_res_phase2_ops as ops
from hf_depthattn.kernels.attn_res_group_configs import PHASE2_WARPS, phase2_config
from hf_depthattn.kernels.attn_res_group_inputs import Phase2GradientInputs, Phase2Inputs
from hf_depthattn.kernels.attn_res_phase2_ops import PHASE2_TRITON, attn_res_phase2_limit, attn_res_phase2_triton
from hf_depthattn.kernels.attn_res_read import attn_res_read_kernel
from hf_depthattn.kernels.attn_res_read_backward import attn_res_read_backward_kernel

# (tokens, channels, sources): one and several programs, chunks and launches.
SHAPES = [(1, 8, 1), (18, 123, 1), (3, 264, 2), (5, 24, 3), (3, 40, 16), (2, 16, 18), (5, 24, 33), (2, 5128, 9)]
SCALE = 2.0


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, has_update: bool = True, has_prior: bool = True
) -> Phase2Inputs:
    tokens, channels, num_sources = shape
    sources = [draw(1, tokens, channels, dtype=dtype) for _ in range(num_sources)]
    weight = (draw(channels, dtype=wide(dtype)).detach() * channels**-0.5).requires_grad_()
    update = draw(1, tokens, channels, dtype=dtype) if has_update else None
    if not has_prior:
        return Phase2Inputs(sources, weight, EPS, SCALE, update)
    # About as much weight as all sources.
    lse = (draw(tokens, dtype=wide(dtype)).detach() + math.log(num_sources)).requires_grad_()
    return Phase2Inputs(sources, weight, EPS, SCALE, update, draw(1, tokens, channels, dtype=dtype), lse)


def leaves_of(given: Phase2Inputs) -> list[Tensor]:
    optional = (given.update, given.prior_out, given.prior_lse)
    return [*given.sources, given.score_weight, *(x for x in optional if x is not None)]


def detached(given: Phase2Inputs) -> Phase2Inputs:
    others = {name: None if x is None else x.detach() for name, x in given._asdict().items() if name in _OPTIONAL}
    sources = [source.detach() for source in given.sources]
    return given._replace(sources=sources, score_weight=given.score_weight.detach(), **others)


_OPTIONAL = ("update", "prior_out", "prior_lse")


@pytest.mark.slow
@pytest.mark.parametrize("has_update", [True, False], ids=["update", "settled"])
@pytest.mark.parametrize("kept", ["read", "prior", "nothing"])
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-D{0[1]}-R{0[2]}".format)
@in_every_dtype
def test_parity(shape, kept, has_update, dtype):
    """Values and gradients with h or o kept, or without a prior; every third source has no later use."""
    if kept == "read" and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("in 16 bits, h has a rounding error and o is kept")
    # The gradient of the log-sum-exp is one number at one token, which cancels in one draw of ten.
    torch.manual_seed(1)
    has_prior = kept != "nothing"
    given = detached(inputs(shape, dtype, has_update, has_prior))
    h, newest, stats = PHASE2_TRITON.forward(given)
    if has_update:
        assert torch.equal(newest, given.sources[-1] + given.update)
    else:
        assert newest is given.sources[-1]
    sources = [*given.sources[:-1], newest]
    grad_h = torch.randn_like(h)
    passed = [None if i % 3 == 1 else torch.randn_like(source) for i, source in enumerate(sources)]
    grads = PHASE2_TRITON.backward(
        Phase2GradientInputs(
            grad_h, passed, sources, given.score_weight, SCALE, stats,
            {"read": h, "prior": given.prior_out, "nothing": None}[kept], kept == "read", has_prior, True,
        )
    )  # fmt: skip
    # The read sees the rounded sum.
    exact = doubles([*sources, given.score_weight, *((given.prior_out, given.prior_lse) if has_prior else ())])
    exact_sources, (exact_weight, *prior) = exact[: len(sources)], exact[len(sources) :]
    exact_h, _ = attn_res_phase2_reference(Phase2Inputs(exact_sources, exact_weight, EPS, SCALE, None, *prior))
    exact_passed = [(source, grad) for source, grad in zip(exact_sources, passed, strict=True) if grad is not None]
    results, upstream = zip((exact_h, grad_h), *exact_passed, strict=True)
    exact_grads = torch.autograd.grad(results, exact, [grad.double() for grad in upstream])
    check_close("read", dtype, [h], [exact_h])
    check_close("gradients", dtype, grads.sources, exact_grads[: len(sources)])
    check_close("gradient of the weight", wide(dtype), [grads.score_weight], [exact_grads[len(sources)]])
    if has_prior:
        check_close("gradient of the prior", dtype, [grads.prior_out], exact_grads[-2:-1])
        # Minus the sum of all gradients of logits, which are up to ten times larger.
        error = (grads.prior_lse - exact_grads[-1]).norm() / exact_grads[-1].norm()
        assert error <= 10 * torch.finfo(wide(dtype)).eps * (10 if kept == "read" else 1), error
    else:
        assert grads.prior_out is None and grads.prior_lse is None


@pytest.mark.interpreted
@pytest.mark.parametrize("num_sources", [1, 3])
def test_no_tokens(num_sources):
    given = detached(inputs((1, 24, num_sources), torch.float32))
    empty = given._replace(
        sources=[source[:, :0] for source in given.sources],
        update=given.update[:, :0],
        prior_out=given.prior_out[:, :0],
        prior_lse=given.prior_lse[:0],
    )
    h, newest, stats = PHASE2_TRITON.forward(empty)
    assert h.shape == newest.shape == (1, 0, 24)
    sources = [*empty.sources[:-1], newest]
    grads = PHASE2_TRITON.backward(
        Phase2GradientInputs(h, [None] * num_sources, sources, given.score_weight, SCALE, stats, h, True, True, True)
    )
    assert grads.prior_lse.shape == (0,) and not grads.score_weight.any()


@pytest.mark.interpreted
@pytest.mark.parametrize("num_sources", [1, 3])
def test_a_frozen_weight_has_no_gradient(num_sources):
    given = detached(inputs((5, 24, num_sources), torch.float32))
    h, newest, stats = PHASE2_TRITON.forward(given)
    sources = [*given.sources[:-1], newest]
    grads = PHASE2_TRITON.backward(
        Phase2GradientInputs(h, [None] * num_sources, sources, given.score_weight, SCALE, stats, h, True, True, False)
    )
    assert grads.score_weight is None


def op_arguments(given: Phase2Inputs) -> tuple:
    return (list(given.sources), *given[1:])


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("num_sources", [1, 3])
@pytest.mark.parametrize(("has_update", "has_prior"), [(True, True), (False, True), (True, False)])
def test_opcheck(num_sources, has_update, has_prior):
    given = inputs((5, 24, num_sources), torch.float32, has_update, has_prior)
    library = torch.ops.depthattn
    torch.library.opcheck(library.attn_res_group_phase2_triton.default, op_arguments(given))
    given = detached(given)
    h, newest, stats = library.attn_res_group_phase2_triton(*op_arguments(given))
    kept = h if has_prior else None
    sources = [*given.sources[:-1], newest] if has_update else given.sources
    torch.library.opcheck(
        library.attn_res_group_phase2_backward_triton.default,
        (
            h,
            newest if has_update else None,
            sources,
            given.score_weight,
            SCALE,
            stats,
            given.prior_lse,
            kept,
            has_prior,
        ),
    )


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_sources", [1, 3])
def test_compiles_to_one_graph_for_all_lengths_with_the_same_bits_every_time(num_sources, dtype):
    def step(given: Phase2Inputs) -> list[Tensor]:
        h, sources = attn_res_phase2_triton(given)
        # Without the prior, and with the sources of the first read.
        again, _ = attn_res_phase2_triton(given._replace(sources=sources, update=None, prior_out=None, prior_lse=None))
        return [h, again, sources[-1]]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        given = inputs((tokens, 24, num_sources), dtype)
        results = []
        for function in (step, compiled, step):
            outs = function(given)
            grads = torch.autograd.grad(sum(x.float().square().sum() for x in outs), leaves_of(given))
            results.append([*outs, *grads])
        for actual, expected, again in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
            assert torch.equal(actual, again)


@pytest.mark.interpreted
@pytest.mark.parametrize("num_sources", [1, 3])
def test_gradients_of_the_op(num_sources):
    """Of all inputs, with one or both of its results in use."""
    given = inputs((5, 24, num_sources), torch.float32)
    leaves = leaves_of(given)
    (h, sources), (exact_h, exact_sources) = attn_res_phase2_triton(given), attn_res_phase2_reference(given)
    for use in (lambda h, newest: h.sum(), lambda h, newest: h.sum() + newest.square().sum()):
        actual = torch.autograd.grad(use(h, sources[-1]), leaves, retain_graph=True)
        expected = torch.autograd.grad(use(exact_h, exact_sources[-1]), leaves, retain_graph=True)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (actual,) = torch.autograd.grad(sources[-1].sum(), given.update)
    assert torch.equal(actual, torch.ones_like(given.update))


@compiled_only
@pytest.mark.parametrize("num_sources", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ops_have_the_right_shapes_on_cuda_tensors(num_sources, dtype):
    def results(lse: Tensor, weight: Tensor, update: Tensor, prior: Tensor, *sources: Tensor) -> list[Tensor]:
        h, through = attn_res_phase2_triton(Phase2Inputs(sources, weight, EPS, SCALE, update, prior, lse))
        return [h, *through]

    with FakeTensorMode():
        tensors = [torch.empty(2, 3, 24, device="cuda", dtype=dtype) for _ in range(2 + num_sources)]
        arguments = (torch.empty(6, device="cuda"), torch.empty(24, device="cuda"), *tensors)
        graph = make_fx(results)(*arguments)
        outs = graph(*arguments)
        assert [(x.shape, x.dtype, x.device.type) for x in outs] == [((2, 3, 24), dtype, "cuda")] * (1 + num_sources)
    assert "depthattn.attn_res_group_phase2_triton.default" in {str(node.target) for node in graph.graph.nodes}


@compiled_only
def test_what_the_kernels_support():
    def limit(channels: int, dtype: torch.dtype) -> str | None:
        with FakeTensorMode():
            sources = [torch.empty(2, channels, device="cuda", dtype=dtype)]
            return attn_res_phase2_limit(Phase2Inputs(sources, torch.empty(channels, device="cuda"), EPS))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert limit(24, dtype) is None
    assert "at most 8192 channels, got 8200" in limit(8200, torch.bfloat16)
    assert "got torch.float64" in limit(24, torch.float64)


@pytest.mark.interpreted
def test_one_source_on_amd_gpus_is_a_read(monkeypatch):
    """Its kernels have a limit of registers that only NVIDIA GPUs know."""
    given = detached(inputs((5, 24, 1), torch.float32))
    expected = PHASE2_TRITON.forward(given)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(ops, "attn_res_phase2_kernel", None)
    h, newest, _ = PHASE2_TRITON.forward(given)
    torch.testing.assert_close(h, expected.h)
    assert torch.equal(newest, expected.newest)


# --- binaries, compiled ahead of time for GPUs that need not be there; test_attn_res_read.py has those of reads ---

KERNELS = {"phase2": ops.attn_res_phase2_kernel, "phase2_backward": ops.attn_res_phase2_backward_kernel}
_SUMS = ("weight", "stats", "lse")


class Case(NamedTuple):
    """One binary: kernel, dtype of the sources, channels, and whether h is kept instead of o."""

    kernel: str
    dtype: str
    num_channels: int
    keeps_read: bool = False

    def __str__(self) -> str:
        return f"{self.kernel}-{self.dtype}-D{self.num_channels}" + ("-read" if self.keeps_read else "")


FEW = [Case(kernel, "bf16", 4096) for kernel in KERNELS]
SOME = [*FEW, *(Case(kernel, "fp32", 123, kernel == "phase2_backward") for kernel in KERNELS)]


def every() -> list[Case]:
    return [
        Case(kernel, dtype, channels, kernel == "phase2_backward" and dtype == "fp32")
        for dtype in ("bf16", "fp16", "fp32")
        for kernel, rows in PHASE2_WARPS.items()
        for channels in sorted({123, 2560, 7168, *(row.max_channels for row in rows)})
    ]


def compile_case(case: Case, target: str) -> dict:
    kernel, config = KERNELS[case.kernel], phase2_config(case.kernel, case.num_channels)
    constants = config.launch_options(case.num_channels)
    constants |= {"EPS": 1e-6, "KEEPS_READ": case.keeps_read}
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if any(word in name for word in _SUMS) else case.dtype)
        else:
            arguments[name] = "fp32" if name == "read_scale" else "i32"
    used = resources(compile_kernel(kernel, arguments, target, config.num_warps, maxnreg=constants["maxnreg"]))
    per_element = instructions_per_element(target, used, config.num_warps, config.block_t * case.num_channels)
    return {"name": str(case), **used._asdict(), "instructions_per_element": per_element}


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize(("target", "case"), binary_cases(FEW, SOME, targets=TARGETS))
def test_binaries_spill_nothing_and_have_not_grown(target, case, check_binary):
    check_binary(target, compile_case(case, target))


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("target", TARGETS)
def test_only_the_backward_of_the_widest_rows_spills(target, check_binary):
    # On sm_100, 128 registers per thread do not hold rows of 8192 channels of 16 bits with Triton 3.9.
    for case in every():
        is_widest = case.kernel == "phase2_backward" and case.num_channels > 7168 and case.dtype != "fp32"
        check_binary(target, compile_case(case, target), max_stack=16 if is_widest and target == "sm_100" else 0)


@compiled_only
@pytest.mark.parametrize("num_sources", [1, 3])
def test_one_binary_serves_every_number_of_tokens(num_sources, other_gpu, monkeypatch):
    """The launches bind and compile, one binary per kernel."""
    modules = {ops: KERNELS.values(), attn_res_ops: (attn_res_read_kernel, attn_res_read_backward_kernel)}
    launches = []
    for module, kernels in modules.items():
        monkeypatch.setattr(module, "num_programs", lambda *_: 264)
        for kernel in kernels:
            launches.append(CompiledLaunches(kernel, "sm_90"))
            monkeypatch.setattr(module, kernel.fn.__name__, launches[-1])
    monkeypatch.setattr(attn_res_ops, "architecture_of", lambda device: "sm_90")
    for num_tokens in (1, 5, 16, 63):
        matrix, weight = torch.zeros(num_tokens, 24, dtype=torch.bfloat16), torch.zeros(24)
        given = Phase2Inputs([matrix] * num_sources, weight, EPS, SCALE, matrix, matrix, torch.zeros(num_tokens))
        h, newest, stats = PHASE2_TRITON.forward(given)
        sources = [*given.sources[:-1], newest]
        PHASE2_TRITON.backward(
            Phase2GradientInputs(
                h, sources, sources, given.score_weight, SCALE, stats, given.prior_out, False, True, True
            )
        )
    numbers = [(launch.num_launches, len(launch.binaries)) for launch in launches]
    assert numbers == ([(4, 1), (4, 1), (0, 0), (0, 0)] if num_sources == 1 else [(0, 0), (0, 0), (4, 1), (4, 1)])
