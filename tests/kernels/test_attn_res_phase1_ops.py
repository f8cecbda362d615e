"""The kernels of phase 1 of grouped reads against the reference in float64, their ops, and their binaries."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from compiled_kernels import CompiledLaunches, Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import (
    DEVICE,
    EPS,
    TARGETS,
    binary_cases,
    check_close,
    compiled_only,
    doubles,
    draw,
    in_every_dtype,
    wide,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_depthattn.attn_res_phase1_ops import attn_res_phase1_reference
from hf_depthattn.kernels import attn_res_phase1_ops as ops
from hf_depthattn.kernels.attn_res_group_configs import PHASE1_CONFIGS, phase1_config
from hf_depthattn.kernels.attn_res_group_inputs import Phase1GradientInputs, Phase1Inputs
from hf_depthattn.kernels.attn_res_phase1_ops import PHASE1_TRITON, attn_res_phase1_limit, attn_res_phase1_triton

# (tokens, channels, sources, reads): one and several programs, chunks, groups of sources and launches.
SHAPES = [
    (1, 8, 1, 1),
    (5, 24, 3, 2),
    (18, 123, 2, 3),
    (3, 264, 4, 8),
    (5, 40, 17, 5),
    (2, 16, 33, 18),
    (17, 80, 9, 16),
]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tokens, channels, num_sources, num_reads = shape
    sources = [draw(1, tokens, channels, dtype=dtype) for _ in range(num_sources)]
    weights = draw(num_reads, channels, dtype=wide(dtype)).detach() * channels**-0.5
    return sources, weights.requires_grad_()


def every_other(tensors: list[Tensor]) -> list[Tensor | None]:
    return [tensor if i % 2 == 0 else None for i, tensor in enumerate(tensors)]


@pytest.mark.slow
@pytest.mark.parametrize("has_all", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-D{0[1]}-N{0[2]}-S{0[3]}".format)
@in_every_dtype
def test_parity(shape, has_all, dtype):
    """Outputs and gradients, with reads that are not used and sources without later uses, or none of them."""
    leaves, leaf_weights = inputs(shape, dtype)
    sources, weights = [leaf.detach() for leaf in leaves], leaf_weights.detach()
    outs, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
    grad_outs, passed = ([torch.randn_like(x) for x in tensors] for tensors in (outs, sources))
    grad_lse = torch.randn_like(lse)
    given_outs = grad_outs if has_all else every_other(grad_outs)
    given_passed = passed if has_all else every_other(passed)
    given_lse = grad_lse if has_all else None
    grads, grad_weights = PHASE1_TRITON.backward(
        Phase1GradientInputs(given_outs, given_lse, given_passed, sources, weights, lse, logits, rstd, True)
    )
    assert all(x.dtype == dtype and x.shape == sources[0].shape for x in (*outs, *grads))

    *exact_sources, exact_weights = exact = doubles([*leaves, leaf_weights])
    exact_outs, exact_lses = attn_res_phase1_reference(exact_sources, exact_weights, eps=EPS)
    results = [*exact_outs, *exact_lses, *exact_sources]
    upstream = [*given_outs, *(grad_lse if has_all else [None] * len(lse)), *given_passed]
    pairs = [(result, grad.double()) for result, grad in zip(results, upstream, strict=True) if grad is not None]
    used, used_grads = zip(*pairs, strict=True)
    exact_grads = torch.autograd.grad(used, exact, used_grads)
    check_close("outputs", dtype, [*outs, lse], [*exact_outs, torch.stack(exact_lses)])
    # Gradients of all sources together: a source of little weight has one near zero.
    check_close("gradients", dtype, [torch.stack(grads)], [torch.stack(exact_grads[:-1])])
    check_close("gradient of weights", wide(dtype), [grad_weights], exact_grads[-1:])


@pytest.mark.interpreted
def test_no_tokens():
    sources, weights = [torch.zeros(2, 0, 24, device=DEVICE)] * 3, torch.ones(4, 24, device=DEVICE)
    outs, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
    assert [out.shape for out in outs] == [(2, 0, 24)] * 4 and lse.shape == (4, 0)
    unused = [None] * 4
    grads, grad_weights = PHASE1_TRITON.backward(
        Phase1GradientInputs(unused, lse, [None] * 3, sources, weights, lse, logits, rstd, True)
    )
    assert [grad.shape for grad in grads] == [(2, 0, 24)] * 3 and not grad_weights.any()


@pytest.mark.interpreted
def test_frozen_weights_need_no_kernel(monkeypatch):
    sources, weights = inputs((5, 24, 3, 2), torch.float32)
    sources, weights = [source.detach() for source in sources], weights.detach()
    outs, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
    given = Phase1GradientInputs(outs, None, [None] * 3, sources, weights, lse, logits, rstd, True)
    expected, _ = PHASE1_TRITON.backward(given)
    monkeypatch.setattr(ops, "attn_res_phase1_weights_kernel", None)
    grads, grad_weights = PHASE1_TRITON.backward(given._replace(needs_weights=False))
    assert grad_weights is None
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def all_results(*leaves: Tensor) -> list[Tensor]:
    *sources, weights = leaves
    outs, lses = attn_res_phase1_triton(sources, weights, eps=EPS)
    return [*outs, *lses]


@pytest.mark.slow
@pytest.mark.interpreted
def test_opcheck():
    sources, weights = inputs((5, 24, 3, 2), torch.float32)
    library = torch.ops.depthattn
    torch.library.opcheck(library.attn_res_group_phase1_triton.default, (sources, weights, EPS))
    with torch.no_grad():
        sources, weights = [source.detach() for source in sources], weights.detach()
        outs, lse, logits, rstd = library.attn_res_group_phase1_triton(sources, weights, EPS)
        for grad_outs, grad_lse in ((outs, lse), ([outs[0], None], None)):
            torch.library.opcheck(
                library.attn_res_group_phase1_backward_triton.default,
                (grad_outs, grad_lse, sources, weights, lse, logits, rstd),
            )


@pytest.mark.slow
@pytest.mark.interpreted
def test_compiles_to_one_graph_for_all_lengths_with_the_same_bits_every_time():
    compiled = torch.compile(all_results, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        sources, weights = inputs((tokens, 24, 3, 2), torch.float32)
        results = []
        for function in (all_results, compiled, all_results):
            outs = function(*sources, weights)
            grads = torch.autograd.grad(sum(x.square().sum() for x in outs), [*sources, weights])
            results.append([*outs, *grads])
        for actual, expected, again in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
            assert torch.equal(actual, again)


@pytest.mark.interpreted
def test_a_read_may_stay_unused():
    sources, weights = inputs((9, 24, 3, 2), torch.float32)
    actual = torch.autograd.grad(all_results(*sources, weights)[0].sum(), [*sources, weights])
    outs, _ = attn_res_phase1_reference(sources, weights, eps=EPS)
    expected = torch.autograd.grad(outs[0].sum(), [*sources, weights])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@compiled_only
def test_ops_have_the_right_shapes_on_cuda_tensors():
    with FakeTensorMode():
        sources = [torch.empty(2, 3, 24, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        weights = torch.empty(5, 24, device="cuda")
        graph = make_fx(all_results)(*sources, weights)
        results = graph(*sources, weights)
        assert [(x.shape, x.dtype) for x in results] == [((2, 3, 24), torch.bfloat16)] * 5 + [
            ((6,), torch.float32)
        ] * 5
        assert "depthattn.attn_res_group_phase1_triton.default" in {str(node.target) for node in graph.graph.nodes}
        grads, grad_weights = torch.ops.depthattn.attn_res_group_phase1_backward_triton(
            results[:5], None, sources, weights, *(torch.empty(0, device="cuda") for _ in range(3))
        )
        assert [grad.shape for grad in grads] == [(2, 3, 24)] * 4 and grad_weights.shape == (5, 24)


@compiled_only
def test_what_the_kernels_support():
    def limit(channels: int, dtype: torch.dtype) -> str | None:
        with FakeTensorMode():
            sources = [torch.empty(2, channels, device="cuda", dtype=dtype)]
            return attn_res_phase1_limit(Phase1Inputs(sources, torch.empty(3, channels, device="cuda"), EPS))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert limit(24, dtype) is None
    assert "at most 8192 channels, got 8200" in limit(8200, torch.bfloat16)
    assert "got torch.float64" in limit(24, torch.float64)


# --- binaries, compiled ahead of time for GPUs that need not be there ---

KERNELS = {
    "forward": ops.attn_res_phase1_kernel,
    "sources": ops.attn_res_phase1_sources_kernel,
    "weights": ops.attn_res_phase1_weights_kernel,
}
_SUMS = ("weight", "lse", "logits", "rstd", "dots", "factors")


class Case(NamedTuple):
    """One binary: kernel, dtype of the sources, channels and reads of the group."""

    kernel: str
    dtype: str
    num_channels: int
    num_reads: int = 8

    def __str__(self) -> str:
        return f"phase1-{self.kernel}-{self.dtype}-D{self.num_channels}-S{self.num_reads}"


FEW = [Case(kernel, "bf16", channels) for kernel in KERNELS for channels in (2048, 4096)]
SOME = [*FEW, *(Case(kernel, "fp32", 123, num_reads) for kernel in KERNELS for num_reads in (8, 16))]


def every() -> list[Case]:
    return [
        Case(kernel, dtype, channels, num_reads)
        for dtype in ("bf16", "fp16", "fp32")
        for kernel, configs in PHASE1_CONFIGS.items()
        for channels in sorted({8, 123, *(most for _, most in configs)})
        for num_reads in (3, 8, 16)
    ]


def compile_case(case: Case, target: str) -> dict:
    kernel, config = KERNELS[case.kernel], phase1_config(case.kernel, case.num_reads, case.num_channels)
    constants = config.launch_options(case.num_channels, case.num_reads, 4 if case.dtype == "fp32" else 2)
    constants |= {"EPS": 1e-6}
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name.endswith("table_ptr"):
            arguments[name] = Pointer("i64")
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if any(word in name for word in _SUMS) else case.dtype)
        else:
            arguments[name] = "i32"
    binary = compile_kernel(kernel, arguments, target, config.num_warps, maxnreg=constants["maxnreg"])
    used = resources(binary)
    # Of an iteration, for one group of sources.
    elements = config.block_t * constants["BLOCK_D"] * max(1, config.group)
    per_element = instructions_per_element(target, used, config.num_warps, elements)
    return {"name": str(case), **used._asdict(), "instructions_per_element": per_element}


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize(("target", "case"), binary_cases(FEW, SOME, targets=TARGETS))
def test_binaries_spill_nothing_and_have_not_grown(target, case, check_binary):
    check_binary(target, compile_case(case, target))


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_nothing(target, check_binary):
    for case in every():
        check_binary(target, compile_case(case, target))


@compiled_only
def test_one_binary_serves_every_number_of_tokens_and_sources(other_gpu, monkeypatch):
    """The launches bind and compile, one binary per kernel."""
    launches = {kernel.fn.__name__: CompiledLaunches(kernel, "sm_90") for kernel in KERNELS.values()}
    for name, launch in launches.items():
        monkeypatch.setattr(ops, name, launch)
    monkeypatch.setattr(ops, "num_programs", lambda *_: 264)
    weights = torch.zeros(3, 24)
    for num_sources, num_tokens in ((1, 1), (3, 5), (16, 16), (17, 63)):
        sources = [torch.zeros(num_tokens, 24, dtype=torch.bfloat16) for _ in range(num_sources)]
        outs, lse, logits, rstd = PHASE1_TRITON.forward(Phase1Inputs(sources, weights, EPS))
        for grad_outs, passed in ((outs, sources), (every_other(outs), every_other(sources))):
            PHASE1_TRITON.backward(
                Phase1GradientInputs(grad_outs, lse, passed, sources, weights, lse, logits, rstd, True)
            )
    numbers = {name: (launch.num_launches, len(launch.binaries)) for name, launch in launches.items()}
    assert numbers == {
        "attn_res_phase1_kernel": (4, 1),
        "attn_res_phase1_sources_kernel": (8, 1),
        "attn_res_phase1_weights_kernel": (8, 1),
    }
