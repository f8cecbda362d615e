"""Compiles the AttnRes kernels ahead of time, for a GPU that need not be there.

    python kernel_attn_res_compile.py TARGET ... [--every DTYPE | --record]
    python kernel_attn_res_compile.py --launches

Prints one JSON line per binary: its name, resources, and instructions per element of a source. The last number is of
the disassembly as it stands, which is what runs for a token in the forward; the backward has the prologue of its loop
on top. Fails where a number has grown against the table in `kernel_compile`; `--record` writes them there.
`--launches` runs the ops' own launches up to the binary instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from kernel_compile import (
    TARGETS,
    CompiledLaunches,
    Constant,
    Pointer,
    compile_kernel,
    report,
    resources,
    targets_asked_for,
)

from hf_depthattn.kernels import attn_res_ops, attn_res_pull_ops
from hf_depthattn.kernels.attn_res_configs import WARPS, TileConfig, decode_config, read_config
from hf_depthattn.kernels.attn_res_decode import attn_res_decode_kernel
from hf_depthattn.kernels.attn_res_pull import attn_res_pull_kernel
from hf_depthattn.kernels.attn_res_read import attn_res_read_kernel
from hf_depthattn.kernels.attn_res_read_backward import attn_res_read_backward_kernel

NONE = Constant(None)


class Case(NamedTuple):
    """One binary.

    Attributes:
        direction: `"forward"` or `"backward"`.
        dtype: of the sources, a Triton type.
        num_channels, num_sources: D, and the sources of this launch.
        fused: with the add before and the norm after.
        part: which launch of a read: `"only"`, or of several `"first"`, `"last"`, `"rest"` (backward: gradients only);
            `"pulled"` is the only one of a backward that leaves the sources' gradients to `attn_res_pull`.
    """

    direction: str
    dtype: str
    num_channels: int
    num_sources: int
    fused: bool = False
    part: str = "only"

    def __str__(self) -> str:
        fused = "-fused" if self.fused else ""
        return f"{self.direction}-{self.dtype}-D{self.num_channels}-N{self.num_sources}{fused}-{self.part}"


#: What the default run compiles for every target; SOME, for one, adds every dtype and part of a longer read.
FEW = [
    Case("forward", "bf16", 4096, 9),
    Case("forward", "bf16", 123, 3, fused=True),
    Case("backward", "bf16", 4096, 4),
    Case("backward", "bf16", 123, 2, fused=True),
]
SOME = [
    *FEW,
    Case("forward", "fp32", 1024, 2),
    Case("forward", "fp16", 2560, 4, fused=True),
    Case("forward", "fp16", 512, 16, part="first"),
    Case("forward", "bf16", 512, 1, part="last"),
    Case("backward", "fp32", 1024, 3),
    Case("backward", "fp16", 2048, 2, fused=True),
    Case("backward", "bf16", 512, 3, part="first"),
    Case("backward", "bf16", 512, 1, part="last"),
    Case("backward", "bf16", 512, 3, part="rest"),
    Case("backward", "bf16", 2048, 9, part="pulled"),
]


def every(dtype: str) -> list[Case]:
    """All parts and options over both ends of every row of the committed table, and rows no power of two divides."""
    cases = []
    for direction, rows in ((name, rows) for (name, _), rows in WARPS.items() if name in ("forward", "backward")):
        for num_channels in sorted({123, 896, 7168, *(row.max_channels for row in rows)}):
            for num_sources in (1, 9, 16):
                cases += [Case(direction, dtype, num_channels, num_sources, fused) for fused in (False, True)]
    for direction, parts in (("forward", ("first", "last")), ("backward", ("first", "last", "rest"))):
        cases += [Case(direction, dtype, D, 16, part == "last", part) for D in (1024, 4096, 8192) for part in parts]
    cases += [Case("backward", dtype, D, N, part="pulled") for D in (123, 1024, 4096, 8192) for N in (1, 9, 16)]
    return list(dict.fromkeys(cases))


def arguments_of(case: Case, config: TileConfig) -> dict:
    source, sums = Pointer(case.dtype), Pointer("fp32")
    is_only = case.part in ("only", "pulled")
    is_last = is_only or case.part == "last"
    of_update = source if case.fused and is_last else NONE
    of_norm = sums if case.fused and is_last else NONE
    arguments = {"source_ptrs": (source,) * case.num_sources}
    if case.direction == "forward":
        arguments |= {
            "update_ptr": of_update,
            "weight_ptr": sums,
            "norm_weight_ptr": of_norm,
            "carry_ptr": NONE if is_only else sums,
            "out_ptr": source if is_last else NONE,
            "partial_ptr": of_update,
            "stats_ptr": sums,
        }
    else:
        forms_grads, finishes_mix = case.part != "first", is_last
        arguments |= {
            "grad_ptrs": (source,) * case.num_sources,
            "grad_out_ptr": source if finishes_mix else NONE,
            "grad_partial_ptr": of_update,
            "weight_ptr": sums,
            "norm_weight_ptr": of_norm,
            "stats_ptr": sums,
            "carry_ptr": NONE if is_only else sums,
            "delta_ptr": NONE if is_only else sums,
            "grad_weight_ptr": sums if forms_grads else NONE,
            "grad_norm_weight_ptr": of_norm,
            "coefficients_ptr": sums if case.part == "pulled" else NONE,
        }
    arguments |= {"read_scale": "fp32", "num_tokens": "i32", "num_sources": "i32", "first_source": "i32"}
    sizes = {"D": case.num_channels, "BLOCK_T": config.block_t, "BLOCK_D": config.block_d}
    if case.direction == "forward":
        constants = {"EPS": 1e-6, "NORM_EPS": 1e-6, **sizes}
        constants |= {"IS_FIRST": case.part in ("only", "first"), "IS_LAST": is_last}
    else:
        mix_from = {"only": "zero", "pulled": "zero", "first": "zero", "last": "carry", "rest": "done"}[case.part]
        mix_to = "carry" if case.part == "first" else "grads"
        needs_grad = 0 if case.part == "pulled" else (1 << case.num_sources) - 1
        constants = {**sizes, "NEEDS_GRAD": needs_grad, "MIX_FROM": mix_from, "MIX_TO": mix_to}
    return arguments | {name: Constant(value) for name, value in constants.items()}


def compile_decode(dtype: str, num_channels: int, fused: bool, target: str) -> dict:
    """`attn_res_decode` for up to eight finished sources; more are a longer tuple and the same loop."""
    options = decode_config(num_channels).launch_options(num_channels)
    source, sums = Pointer(dtype), Pointer("fp32")
    arguments = {
        "finished_ptrs": (source,) * 8,
        "newest_ptr": source,
        "table_ptr": Pointer("i64"),
        "update_ptr": source if fused else NONE,
        "weight_ptr": sums,
        "norm_weight_ptr": sums if fused else NONE,
        "out_ptr": source,
        "sum_ptr": source if fused else NONE,
        "read_scale": "fp32",
        "num_finished": "i32",
        "num_tokens": "i32",
        **{name: Constant(1e-6) for name in ("EPS", "NORM_EPS")},
        **{name: Constant(options[name]) for name in ("GROUP", "D", "BLOCK_D")},
    }
    used = resources(compile_kernel(attn_res_decode_kernel, arguments, target, options["num_warps"]))
    threads = options["num_warps"] * TARGETS[target][0].warp_size
    return {
        "name": f"decode-{dtype}-D{num_channels}{'-fused' if fused else ''}",
        **used._asdict(),
        "instructions_per_element": round(used.instructions * threads / (options["GROUP"] * num_channels), 2),
    }


def compile_pull(dtype: str, num_channels: int, has_direct: bool, target: str) -> dict:
    """`attn_res_pull`, whose layout does not depend on anything."""
    block_t, block_d, num_warps = attn_res_pull_ops.BLOCK_T, attn_res_pull_ops.BLOCK_D, attn_res_pull_ops.NUM_WARPS
    source, sums = Pointer(dtype), Pointer("fp32")
    arguments = {
        "table_ptr": Pointer("i64"),
        "source_ptr": source,
        "direct_ptr": source if has_direct else NONE,
        "weight_like_ptr": sums,
        "grad_ptr": source,
        "num_tokens": "i32",
        "num_reads": "i32",
        "D": Constant(num_channels),
        "BLOCK_T": Constant(block_t),
        "BLOCK_D": Constant(block_d),
    }
    used = resources(compile_kernel(attn_res_pull_kernel, arguments, target, num_warps))
    per_element = used.instructions * num_warps * TARGETS[target][0].warp_size / (block_t * block_d)
    return {
        "name": f"pull-{dtype}-D{num_channels}-{'direct' if has_direct else 'alone'}",
        "num_warps": num_warps,
        **used._asdict(),
        "instructions_per_element": round(per_element, 2),
    }


def compile_case(case: Case, target: str) -> dict:
    kernel = attn_res_read_kernel if case.direction == "forward" else attn_res_read_backward_kernel
    config = read_config(case.direction, target, case.num_channels, case.num_sources)
    used = resources(compile_kernel(kernel, arguments_of(case, config), target, config.num_warps))
    elements = case.num_sources * config.block_t * case.num_channels
    per_element = used.instructions * config.num_warps * TARGETS[target][0].warp_size / elements
    return {
        "name": str(case),
        "num_warps": config.num_warps,
        **used._asdict(),
        "instructions_per_element": round(per_element, 2),
    }


def check_launches(target: str) -> None:
    """The ops' own launches bind and compile, and one binary per kernel and part serves every number of tokens."""
    launches = {}
    for name in ("attn_res_read_kernel", "attn_res_read_backward_kernel"):
        launches[name] = CompiledLaunches(getattr(attn_res_ops, name), target)
        setattr(attn_res_ops, name, launches[name])
    attn_res_ops.architecture_of = lambda device: target
    attn_res_ops.num_programs = lambda *_: 264
    forward, backward = launches.values()
    weight, norm_weight = torch.zeros(24), torch.ones(24)
    for num_sources, num_forward, num_backward in ((3, 1, 1), (17, 2, 3)):
        for num_tokens in (1, 5, 16, 63):
            sources = [torch.zeros(num_tokens, 24, dtype=torch.bfloat16) for _ in range(num_sources)]
            out, partial, stats = torch.ops.depthattn.attn_res_read_triton(
                sources, weight, 1e-6, 3.0, sources[0], norm_weight, 1e-6
            )
            needs_grad = [True] * num_sources
            torch.ops.depthattn.attn_res_read_triton_backward(
                out, partial, sources, weight, stats, 3.0, norm_weight, needs_grad
            )
        assert (forward.num_launches, len(forward.binaries)) == (4 * num_forward, num_forward)
        assert (backward.num_launches, len(backward.binaries)) == (4 * num_backward, num_backward)
        for launch in launches.values():
            launch.num_launches, launch.binaries = 0, set()


def compiled(target: str, dtype: str | None) -> Iterator[dict]:
    """Numbers of every binary: of all layouts for a dtype, or of some."""
    for case in every(dtype) if dtype else SOME if target == "sm_90" else FEW:
        yield compile_case(case, target)
    for num_channels, has_direct in ((4096, True), (123, False)):
        yield compile_pull(dtype or "bf16", num_channels, has_direct, target)
    for num_channels in (123, 1024, 2560, 4096, 7168, 8192) if dtype else (1024, 4096):
        yield compile_decode(dtype or "bf16", num_channels, True, target)


def main() -> None:
    if "--launches" in sys.argv:
        return check_launches("sm_90")
    dtype = sys.argv[sys.argv.index("--every") + 1] if "--every" in sys.argv else None
    for target in targets_asked_for():
        report(target, compiled(target, dtype))


if __name__ == "__main__":
    main()
