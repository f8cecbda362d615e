"""The kernels of Block AttnRes' two phases against the references in float64, their ops, and their binaries."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from compiled_kernels import CompiledLaunches, Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import DEVICE, EPS, TARGETS, check_close, compiled_only, doubles, in_every_dtype, wide
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_depthattn import op_dispatch
from hf_depthattn.experimental.attn_res_two_phase_ops import (
    attn_res_phase1,
    attn_res_phase1_reference,
    attn_res_phase2,
    attn_res_phase2_reference,
)
from hf_depthattn.kernels import attn_res_two_phase_ops as ops
from hf_depthattn.kernels.attn_res_two_phase_configs import PHASE1_CONFIGS, PHASE2_WARPS, phase1_config, phase2_config

NORM_EPS = 1e-3
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


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}-D{0[1]}-N{0[2]}-S{0[3]}".format)
@in_every_dtype
def test_phase1_parity(shape, dtype):
    """Outputs, log-sum-exps and every gradient equal those of the reference in float64."""
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
    check_close("outs", dtype, outs, exact_outs)
    check_close("log-sum-exps", dtype, lses, exact_lses)
    # Gradients of all sources together: a source of little weight has one near zero.
    check_close("gradients", dtype, [torch.stack(grads[:-1])], [torch.stack(exact_grads[:-1])])
    check_close("gradient of weights", dtype, grads[-1:], exact_grads[-1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("has_update", "has_norm"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "update", "norm", "both"],
)
@pytest.mark.parametrize("shape", [shape[:2] for shape in SHAPES], ids="T{0[0]}-D{0[1]}".format)
@in_every_dtype
def test_phase2_parity(shape, has_update, has_norm, dtype):
    """With and without the sum before and the norm after."""
    # The gradient of the log-sum-exp is one number at one token, which cancels in one draw of ten.
    torch.manual_seed(1)
    tokens, channels = shape
    partial, seq_out = (draw(1, tokens, channels, dtype=dtype) for _ in range(2))
    update = draw(1, tokens, channels, dtype=dtype) if has_update else None
    lse = draw(1, tokens, dtype=wide(dtype))
    weight = (draw(channels, dtype=wide(dtype)).detach() * channels**-0.5).requires_grad_()
    norm_weight = draw(channels, dtype=wide(dtype)) if has_norm else None
    options = {"eps": EPS, "read_scale": 2.0, "norm_eps": NORM_EPS}
    leaves = [x for x in (partial, update, seq_out, lse, weight, norm_weight) if x is not None]
    results = list(
        attn_res_phase2(partial, update, seq_out, lse, weight, norm_weight=norm_weight, impl="triton", **options)
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
    check_close("phase 2", dtype, [*results, *grads], [*expected, *exact_grads])


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


@pytest.mark.slow
@pytest.mark.interpreted
def test_opcheck():
    *sources, partial, update, first, second, norm_weight = inputs()
    weights = torch.stack((first, second)).detach().requires_grad_()
    library = torch.ops.depthattn
    torch.library.opcheck(library.attn_res_phase1_triton.default, (sources, weights, EPS))
    lse = draw(1, 5, dtype=torch.float32)
    for extra in (None, update):
        norm = None if extra is None else norm_weight
        arguments = (partial, extra, sources[0], lse, first, EPS, 2.0, norm, NORM_EPS)
        torch.library.opcheck(library.attn_res_phase2_triton.default, arguments)
    with torch.no_grad():
        plain = [x.detach() for x in sources]
        outs, lses, logits, rstd = library.attn_res_phase1_triton(plain, weights.detach(), EPS)
        torch.library.opcheck(
            library.attn_res_phase1_triton_backward.default, (outs, lses, plain, weights.detach(), lses, logits, rstd)
        )
        arguments = tuple(None if x is None else x.detach() if isinstance(x, Tensor) else x for x in arguments)
        out, total, stats = library.attn_res_phase2_triton(*arguments)
        arguments = (out, total, total, outs[0], lses[0], arguments[4], arguments[7], stats, 2.0)
        torch.library.opcheck(library.attn_res_phase2_triton_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.interpreted
def test_compiles_to_one_graph_for_all_lengths_with_the_same_bits_every_time():
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


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_read_may_stay_unused():
    leaves = inputs(9)
    only_first = torch.autograd.grad(two_reads(*leaves)[0].sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad(two_reads(*leaves, impl="torch")[0].sum(), leaves, allow_unused=True)
    for actual, expected in zip(only_first, wanted, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def ops_of(channels: int, dtype: torch.dtype) -> set[str]:
    """Ops of two reads on CUDA tensors, fake ones, whose results have the right shapes."""
    with FakeTensorMode():
        tensors = [torch.empty(1, 5, channels, device="cuda", dtype=dtype) for _ in range(5)]
        weights = [torch.empty(channels, device="cuda") for _ in range(3)]
        graph = make_fx(lambda *leaves: two_reads(*leaves, impl="auto"))(*tensors, *weights)
        for result in graph(*tensors, *weights):
            assert result.shape == (1, 5, channels) and result.dtype == dtype and result.device.type == "cuda"
    return {str(node.target) for node in graph.graph.nodes}


@compiled_only
def test_cuda_tensors_take_the_kernels():
    assert op_dispatch.OPS["attn_res_two_phase_1"].triton_impl is not None
    fast = {"depthattn.attn_res_phase1_triton.default", "depthattn.attn_res_phase2_triton.default"}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert fast <= ops_of(24, dtype)
    assert not fast & ops_of(8200, torch.bfloat16) and not fast & ops_of(24, torch.float64)


# --- binaries, compiled ahead of time for GPUs that need not be there ---

KERNELS = {
    "logits": ops.attn_res_phase1_logits_kernel,
    "mix": ops.attn_res_phase1_mix_kernel,
    "dots": ops.attn_res_phase1_dots_kernel,
    "grads": ops.attn_res_phase1_grads_kernel,
    "phase2": ops.attn_res_phase2_kernel,
    "phase2_backward": ops.attn_res_phase2_backward_kernel,
}
_SUMS = ("weight", "stats", "lse", "logits", "rstd", "dots")


class Case(NamedTuple):
    """One binary: kernel, dtype of the sources, channels, reads of the block (phase 1), and a fused norm (phase 2)."""

    kernel: str
    dtype: str
    num_channels: int
    num_reads: int = 8
    has_norm: bool = True

    def __str__(self) -> str:
        more = f"S{self.num_reads}" if self.kernel in PHASE1_CONFIGS else "norm" if self.has_norm else "plain"
        return f"{self.kernel}-{self.dtype}-D{self.num_channels}-{more}"


FEW = [Case(kernel, "bf16", 4096) for kernel in KERNELS]
SOME = [*FEW, *(Case(kernel, "fp32", 123, 3, False) for kernel in KERNELS)]


def every() -> list[Case]:
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for kernel, configs in PHASE1_CONFIGS.items():
            reads = sorted({1, 3, *configs})
            cases += [Case(kernel, dtype, channels, S) for channels in (123, 4096) for S in reads]
        for kernel in ("phase2", "phase2_backward"):
            channels = sorted({123, 2560, 7168, *(row.max_channels for row in PHASE2_WARPS[kernel])})
            cases += [Case(kernel, dtype, D, has_norm=norm) for D in channels for norm in (False, True)]
    return cases


def compile_case(case: Case, target: str) -> dict:
    kernel = KERNELS[case.kernel]
    if case.kernel in PHASE1_CONFIGS:
        config = phase1_config(case.kernel, case.num_reads)
        constants = config.launch_options(case.num_channels, case.num_reads)
        elements = config.block_t * config.block_d
    else:
        config = phase2_config(case.kernel, case.num_channels)
        constants = config.launch_options(case.num_channels)
        elements = config.block_t * case.num_channels
    constants |= {"EPS": 1e-6, "NORM_EPS": 1e-6}
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name in ("norm_weight_ptr", "grad_norm_weight_ptr") and not case.has_norm:
            arguments[name] = Constant(None)
        elif name.endswith("table_ptr"):
            arguments[name] = Pointer("i64")
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if any(word in name for word in _SUMS) else case.dtype)
        else:
            arguments[name] = "fp32" if name == "read_scale" else "i32"
    limit = {"maxnreg": constants["maxnreg"]} if "maxnreg" in constants else {}
    used = resources(compile_kernel(kernel, arguments, target, config.num_warps, **limit))
    per_element = instructions_per_element(target, used, config.num_warps, elements)
    return {"name": str(case), **used._asdict(), "instructions_per_element": per_element}


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize(
    ("target", "case"),
    [(target, case) for target in TARGETS for case in (SOME if target == "sm_90" else FEW)],
    ids=str,
)
def test_binaries_spill_nothing_and_have_not_grown(target, case, check_binary):
    check_binary(target, compile_case(case, target))


@pytest.mark.slow
@compiled_only
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_next_to_nothing(target, check_binary):
    # Rows of more than 4096 channels: 128 registers per thread hold all but 8 bytes of the backward of phase 2.
    for case in every():
        check_binary(target, compile_case(case, target), may_spill="phase2_backward")


@compiled_only
def test_one_binary_serves_every_number_of_tokens_and_sources(other_gpu, monkeypatch):
    """The ops' own launches bind and compile, one binary per kernel."""
    launches = {kernel.fn.__name__: CompiledLaunches(kernel, "sm_90") for kernel in KERNELS.values()}
    for name, launch in launches.items():
        monkeypatch.setattr(ops, name, launch)
    monkeypatch.setattr(ops, "num_programs", lambda *_: 264)
    weights, norm_weight = torch.zeros(3, 24), torch.ones(24)
    for num_sources, num_tokens in ((1, 1), (3, 5), (16, 16), (17, 63)):
        sources = [torch.zeros(num_tokens, 24, dtype=torch.bfloat16) for _ in range(num_sources)]
        outs, lses, logits, rstd = torch.ops.depthattn.attn_res_phase1_triton(sources, weights, 1e-6)
        torch.ops.depthattn.attn_res_phase1_triton_backward(outs, lses, sources, weights, lses, logits, rstd)
        partial, update = sources[0], torch.zeros_like(sources[0])
        out, total, stats = torch.ops.depthattn.attn_res_phase2_triton(
            partial, update, outs[0], lses[0], weights[0], 1e-6, 2.0, norm_weight, 1e-6
        )
        torch.ops.depthattn.attn_res_phase2_triton_backward(
            out, total, total, outs[0], lses[0], weights[0], norm_weight, stats, 2.0
        )
    for name, launch in launches.items():
        assert (launch.num_launches, len(launch.binaries)) == (4, 1), (name, launch.num_launches, launch.binaries)
