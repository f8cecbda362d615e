"""Compiles MoDA's Triton kernels ahead of time, for a GPU that need not be there.

    python kernel_moda_compile.py TARGET ... [--every | --record]
    python kernel_moda_compile.py --launches

Prints one JSON line per binary: its name, resources, and instructions per element of the slots of a block. Fails where
a number has grown against the table in `kernel_compile`; `--record` writes them there. `--launches` runs the ops' own
launches up to the binary instead.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
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

from hf_depthattn.kernels import launches, moda_depth_ops
from hf_depthattn.kernels.moda_depth import moda_depth_backward_kernel, moda_depth_forward_kernel
from hf_depthattn.kernels.moda_depth_configs import BACKWARD_CONFIGS, FORWARD_CONFIGS, MAX_REGISTERS

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
DIRECTIONS = {
    "forward": (moda_depth_forward_kernel, FORWARD_CONFIGS, 8),
    "backward": (moda_depth_backward_kernel, BACKWARD_CONFIGS, 16),
}


class Case(NamedTuple):
    """One binary: direction, dtype, query heads of a key-value head, dimensions of a key and of a value, soft cap."""

    direction: str
    dtype: str
    group: int
    key_dim: int
    value_dim: int
    has_softcap: bool = False

    def __str__(self) -> str:
        softcap = "-softcap" if self.has_softcap else ""
        return f"moda-{self.direction}-{self.dtype}-G{self.group}-d{self.key_dim}-dv{self.value_dim}{softcap}"


#: What the default run compiles for every target; SOME, for sm_90, is every committed configuration in bf16 and fp32.
FEW = [Case(direction, "bf16", 8, dim, dim) for direction in DIRECTIONS for dim in (64, 128)]


def committed(dtypes: tuple[str, ...], groups: tuple[int, ...]) -> list[Case]:
    return [
        Case(direction, dtype, group, width, width)
        for direction, (_, configs, _) in DIRECTIONS.items()
        for dtype in dtypes
        for width in configs[ELEMENT_BYTES[dtype]]
        for group in groups
    ]


SOME = list(dict.fromkeys([*FEW, *committed(("bf16", "fp32"), (8,))]))


def every() -> list[Case]:
    """All dtypes, groups, uneven dimensions and soft caps over the whole table."""
    cases = committed(("bf16", "fp16", "fp32"), (1, 7, 8, 16))
    for case in committed(("bf16", "fp16", "fp32"), (8,)):
        cases += [case._replace(key_dim=case.key_dim * 5 // 8), case._replace(has_softcap=True)]
    return cases


def compile_case(case: Case, target: str) -> dict:
    kernel, configs, smallest_group = DIRECTIONS[case.direction]
    widths = [max(16, triton.next_power_of_2(dim)) for dim in (case.key_dim, case.value_dim)]
    config = configs[ELEMENT_BYTES[case.dtype]][max(widths)]
    constants = {
        "HK": 8,
        "G": case.group,
        "GP": max(smallest_group, triton.next_power_of_2(case.group)),
        "D": case.key_dim,
        "DV": case.value_dim,
        "DP": widths[0],
        "DVP": widths[1],
        "BL": config.num_slots,
        "HAS_SOFTCAP": case.has_softcap,
        "IS_ALIGNED": case.key_dim % 8 == 0,
        "WIDE": tl.float32,
        "PRECISION": config.precision,
    }
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name == "table_ptr":
            arguments[name] = Pointer("i64")
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if "lse" in name else case.dtype)
        else:
            arguments[name] = "fp32" if name in ("scale", "softcap") else "i32"
    used = resources(compile_kernel(kernel, arguments, target, config.num_warps, maxnreg=MAX_REGISTERS))
    elements = config.num_slots * (case.key_dim + case.value_dim)
    per_element = used.instructions * config.num_warps * TARGETS[target][0].warp_size / elements
    return {
        "name": str(case),
        **used._asdict(),
        "instructions_per_element": round(per_element, 2),
    }


def check_launches(target: str) -> None:
    """The ops' own launches bind and compile, and one binary per direction serves every length and number of slots."""
    spied = {}
    for name in ("moda_depth_forward_kernel", "moda_depth_backward_kernel"):
        spied[name] = CompiledLaunches(getattr(moda_depth_ops, name), target)
        setattr(moda_depth_ops, name, spied[name])
    forward, backward = spied.values()
    for num_tokens, num_slots in ((1, 1), (5, 3), (16, 16), (63, 33)):

        def states(heads, num_tokens=num_tokens):
            return torch.zeros(2, num_tokens, heads, 64, dtype=torch.bfloat16).transpose(1, 2)

        slots = [states(2) for _ in range(num_slots)]
        inputs, lse = (states(16), slots, slots), torch.zeros(2, 16, num_tokens)
        out, _ = moda_depth_ops.depth_forward_triton(*inputs, states(16), lse, 0.125, 0.0)
        moda_depth_ops.depth_backward_triton(out, *inputs, out, lse, 0.125, 0.0)
    for launch in (forward, backward):
        assert (launch.num_launches, len(launch.binaries)) == (4, 1), (launch.num_launches, launch.binaries)
    check_table_launches(target)


def check_table_launches(target: str) -> None:
    """Nothing is compiled for the numbers in a table: what the warm-up loaded serves the capture of a CUDA graph."""
    launch = CompiledLaunches(launches._write_numbers_kernel, target)
    launches._write_numbers_kernel = launch
    for numbers in ([1] * 12, [16, 2**40, 2**40 + 1] * 5, [0, -16, 7], [3] * 128 + [1], [2**31] * 300):
        launches.written_table(torch.device("cpu"), numbers)
    # Tables of up to 16, 4 and 128 numbers.
    assert (launch.num_launches, len(launch.binaries)) == (8, 3), (launch.num_launches, launch.binaries)


def main() -> None:
    if "--launches" in sys.argv:
        return check_launches("sm_90")
    for target in targets_asked_for():
        cases = every() if "--every" in sys.argv else SOME if target == "sm_90" else FEW
        report(target, (compile_case(case, target) for case in cases))


if __name__ == "__main__":
    main()
