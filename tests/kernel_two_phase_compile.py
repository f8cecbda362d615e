"""Compiles the kernels of Block AttnRes' two phases ahead of time, for a GPU that need not be there.

    python kernel_two_phase_compile.py TARGET ... [--every | --record]
    python kernel_two_phase_compile.py --launches

Prints one JSON line per binary: its name, resources, and instructions per element of a source that a step loads. Fails
where a number has grown against the table in `kernel_compile`; `--record` writes them there. `--launches` runs the
ops' own launches up to the binary instead.
"""

from __future__ import annotations

import sys
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

from hf_depthattn.kernels import attn_res_two_phase_ops as ops
from hf_depthattn.kernels.attn_res_two_phase_configs import PHASE1_CONFIGS, PHASE2_WARPS, phase1_config, phase2_config

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
    per_element = used.instructions * config.num_warps * TARGETS[target][0].warp_size / elements
    return {
        "name": str(case),
        **used._asdict(),
        "instructions_per_element": round(per_element, 2),
    }


def check_launches(target: str) -> None:
    """The ops' own launches bind and compile, and a binary serves every number of tokens and of sources."""
    launches = {}
    for kernel in KERNELS.values():
        name = kernel.fn.__name__
        launches[name] = CompiledLaunches(kernel, target)
        setattr(ops, name, launches[name])
    ops.architecture_of = lambda device: target
    ops.num_programs = lambda *_: 264
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


def main() -> None:
    if "--launches" in sys.argv:
        return check_launches("sm_90")
    for target in targets_asked_for():
        cases = every() if "--every" in sys.argv else SOME if target == "sm_90" else FEW
        report(target, (compile_case(case, target) for case in cases))


if __name__ == "__main__":
    main()
