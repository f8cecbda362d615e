"""Binaries of the AttnRes read and its backward, compiled ahead of time for GPUs that need not be there.

Instructions per element of a source are of the disassembly as it stands, which is what runs for a token in the
forward; the backward has the prologue of its loop on top.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from compiled_kernels import CompiledLaunches, Constant, Pointer, compile_kernel, instructions_per_element, resources
from kernel_inputs import TARGETS, binary_cases, compiled_only

from hf_depthattn.kernels import attn_res_ops
from hf_depthattn.kernels.attn_res_configs import WARPS, TileConfig, most_sources, read_config
from hf_depthattn.kernels.attn_res_read import attn_res_read_kernel
from hf_depthattn.kernels.attn_res_read_backward import attn_res_read_backward_kernel
from hf_depthattn.kernels.triton_runtime import triton_version

pytestmark = compiled_only
NONE = Constant(None)


class Case(NamedTuple):
    """One binary.

    Attributes:
        direction: `"forward"` or `"backward"`.
        dtype: of the sources, a Triton type.
        num_channels, num_sources: D, and the sources of this launch.
        part: which launch of a read: `"only"`, or of several `"first"`, `"last"`, `"rest"` (backward: gradients only);
            in phase 2 of grouped reads, `"joined"` is the only one of a read with a prior and an update, or with a
            prior and gradients from later uses, and `"kept"` the only one of a backward with h.
    """

    direction: str
    dtype: str
    num_channels: int
    num_sources: int
    part: str = "only"

    def __str__(self) -> str:
        return f"{self.direction}-{self.dtype}-D{self.num_channels}-N{self.num_sources}-{self.part}"


#: What is compiled for every target; SOME, for one, adds every dtype and part of a longer read.
FEW = [
    Case("forward", "bf16", 4096, 9),
    Case("forward", "bf16", 123, 3),
    Case("backward", "bf16", 4096, 4),
    Case("backward", "bf16", 123, 2),
    Case("forward", "bf16", 4096, 4, part="joined"),
    Case("backward", "bf16", 4096, 4, part="joined"),
]
SOME = [
    *FEW,
    Case("forward", "fp32", 1024, 2),
    Case("forward", "fp16", 2560, 4),
    Case("forward", "fp16", 512, 16, part="first"),
    Case("forward", "bf16", 512, 1, part="last"),
    Case("backward", "fp32", 1024, 3),
    Case("backward", "fp16", 2048, 2),
    Case("backward", "bf16", 512, 3, part="first"),
    Case("backward", "bf16", 512, 1, part="last"),
    Case("backward", "bf16", 512, 3, part="rest"),
    Case("forward", "fp32", 1024, 3, part="joined"),
    Case("backward", "fp32", 1024, 3, part="joined"),
    Case("backward", "fp32", 1024, 3, part="kept"),
]


def every(dtype: str) -> list[Case]:
    """All parts and options over both ends of every row of the committed table, and rows no power of two divides."""
    cases = []
    for direction, rows in ((name, rows) for (name, _), rows in WARPS.items() if name in ("forward", "backward")):
        for num_channels in sorted({123, 896, 7168, *(row.max_channels for row in rows)}):
            for num_sources in (1, 9, 16):
                cases.append(Case(direction, dtype, num_channels, num_sources))
    for direction, parts in (("forward", ("first", "last")), ("backward", ("first", "last", "rest"))):
        for num_channels in (1024, 4096, 8192):
            most = most_sources(num_channels, is_complex=direction == "backward")
            cases += [Case(direction, dtype, num_channels, most, part) for part in parts]
    joined = [("forward", "joined"), ("backward", "joined"), ("backward", "kept")]
    for direction, part in joined:
        for num_channels in (123, 4096, 8192):
            most = most_sources(num_channels, is_complex=True)
            cases += [Case(direction, dtype, num_channels, num_sources, part) for num_sources in (1, most)]
    return list(dict.fromkeys(cases))


def arguments_of(case: Case, config: TileConfig) -> dict:
    source, sums = Pointer(case.dtype), Pointer("fp32")
    is_only = case.part in ("only", "joined", "kept")
    is_last = is_only or case.part == "last"
    arguments = {"source_ptrs": (source,) * case.num_sources}
    if case.direction == "forward":
        arguments |= {
            "weight_ptr": sums,
            "carry_ptr": NONE if is_only else sums,
            "out_ptr": source if is_last else NONE,
            "stats_ptr": sums,
        }
    else:
        forms_grads, finishes_mix = case.part != "first", is_last
        arguments |= {
            "grad_ptrs": (source,) * case.num_sources,
            "grad_out_ptr": source if finishes_mix else NONE,
            "weight_ptr": sums,
            "stats_ptr": sums,
            "carry_ptr": NONE if is_only else sums,
            "delta_ptr": NONE if is_only else sums,
            "grad_weight_ptr": sums if forms_grads else NONE,
        }
    arguments |= {"read_scale": "fp32", "num_tokens": "i32", "num_sources": "i32", "first_source": "i32"}
    sizes = {"D": case.num_channels, "BLOCK_T": config.block_t, "BLOCK_D": config.block_d}
    if case.direction == "forward":
        constants = {"EPS": 1e-6, **sizes}
        constants |= {"IS_FIRST": case.part != "last", "IS_LAST": is_last}
    else:
        mix_from = {"last": "carry", "rest": "done", "kept": "read"}.get(case.part, "zero")
        mix_to = "carry" if case.part == "first" else "grads"
        needs_grad = (1 << case.num_sources) - 1
        constants = {**sizes, "NEEDS_GRAD": needs_grad, "MIX_FROM": mix_from, "MIX_TO": mix_to}
    arguments |= {name: Constant(value) for name, value in constants.items()}
    is_joined, is_kept = case.part == "joined", case.part == "kept"
    if case.direction == "forward":
        names = {"prior_ptr": source, "prior_lse_ptr": sums, "update_ptr": source, "newest_ptr": source}
        return arguments | {name: pointer if is_joined else NONE for name, pointer in names.items()}
    has_prior = is_joined or is_kept
    return arguments | {
        "prior_ptr": source if is_joined else NONE,
        "prior_lse_ptr": sums if has_prior else NONE,
        "read_ptr": source if is_kept else NONE,
        "grad_prior_ptr": source if has_prior else NONE,
        "grad_prior_lse_ptr": sums if has_prior else NONE,
        "passed_ptrs": (source,) * case.num_sources if has_prior else NONE,
        "HAS_PASSED": Constant((1 << case.num_sources) - 1 if has_prior else 0),
    }


def compile_case(case: Case, target: str) -> dict:
    kernel = attn_res_read_kernel if case.direction == "forward" else attn_res_read_backward_kernel
    direction = "joined" if (case.direction, case.part) == ("forward", "joined") else case.direction
    config = read_config(direction, target, case.num_channels, case.num_sources)
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    used = resources(compile_kernel(kernel, arguments_of(case, config), target, config.num_warps, **limit))
    elements = case.num_sources * config.block_t * case.num_channels
    per_element = instructions_per_element(target, used, config.num_warps, elements)
    return {"name": str(case), **used._asdict(), "instructions_per_element": per_element}


@pytest.mark.parametrize(("target", "case"), binary_cases(FEW, SOME, targets=(*TARGETS, "gfx942")))
def test_binaries_spill_nothing_and_have_not_grown(target, case, check_binary):
    check_binary(target, compile_case(case, target))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_committed_configuration_spills_nothing(target, dtype, check_binary):
    # In the backward, Triton 3.6 holds a register per reduction over the whole loop, and spills some bytes.
    max_stack = 72 if triton_version() < (3, 7) else 0
    for case in every(dtype):
        check_binary(target, compile_case(case, target), max_stack if case.direction == "backward" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("num_sources", "num_forward", "num_backward"), [(3, 1, 1), (17, 2, 3)])
def test_one_binary_serves_every_number_of_tokens(num_sources, num_forward, num_backward, other_gpu, monkeypatch):
    """The ops' own launches bind and compile, one binary per kernel and part of a read."""
    forward = CompiledLaunches(attn_res_read_kernel, "sm_90")
    backward = CompiledLaunches(attn_res_read_backward_kernel, "sm_90")
    monkeypatch.setattr(attn_res_ops, "attn_res_read_kernel", forward)
    monkeypatch.setattr(attn_res_ops, "attn_res_read_backward_kernel", backward)
    monkeypatch.setattr(attn_res_ops, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(attn_res_ops, "num_programs", lambda *_: 264)
    weight = torch.zeros(24)
    for num_tokens in (1, 5, 16, 63):
        sources = [torch.zeros(num_tokens, 24, dtype=torch.bfloat16) for _ in range(num_sources)]
        out, stats = torch.ops.depthattn.attn_res_plain_read_triton(sources, weight, 1e-6, 3.0)
        torch.ops.depthattn.attn_res_plain_read_triton_backward(out, sources, weight, stats, 3.0, [True] * num_sources)
    assert (forward.num_launches, len(forward.binaries)) == (4 * num_forward, num_forward)
    assert (backward.num_launches, len(backward.binaries)) == (4 * num_backward, num_backward)
