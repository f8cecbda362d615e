"""Compile MoDA's Triton kernels ahead of time: `kernels_moda_compile.py TARGET...`; one JSON line per binary."""

import json
import sys

import triton
import triton.language as tl
from kernel_compile import TARGETS, Constant, Pointer, compile_kernel, resources

from hf_depthattn.kernels import moda_depth

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def arguments_of(kernel, element: str, group: int, head_dim: int, value_dim: int, slots: int, softcap: bool) -> dict:
    width = {name: max(16, triton.next_power_of_2(dim)) for name, dim in (("DP", head_dim), ("DVP", value_dim))}
    constants = {
        "HK": 8,
        "G": group,
        "GP": max(8 if kernel is moda_depth._forward_kernel else 16, triton.next_power_of_2(group)),
        "D": head_dim,
        "DV": value_dim,
        **width,
        "BL": slots,
        "HAS_SOFTCAP": softcap,
        "IS_ALIGNED": head_dim % 8 == 0,
        "WIDE": tl.float32,
    }
    arguments = {}
    for name in kernel.arg_names:
        if name in constants:
            arguments[name] = Constant(constants[name])
        elif name == "table_ptr":
            arguments[name] = Pointer("i64")
        elif name.endswith("_ptr"):
            arguments[name] = Pointer("fp32" if "lse" in name else element)
        else:
            arguments[name] = "fp32" if name in ("scale", "softcap") else "i32"
    return arguments


def main(targets: list[str], every: bool) -> None:
    tables = (
        ("forward", moda_depth._forward_kernel, moda_depth.FORWARD_CONFIGS),
        ("backward", moda_depth._backward_kernel, moda_depth.BACKWARD_CONFIGS),
    )
    elements = ("bf16", "fp16", "fp32") if every else ("bf16", "fp32")
    groups = (1, 7, 8, 16) if every else (8,)
    for target in targets:
        for direction, kernel, configs in tables:
            for element in elements:
                for width, (slots, warps) in configs[ELEMENT_BYTES[element]].items():
                    shapes = [(group, width, width, False) for group in groups]
                    if every:
                        shapes += [(8, width * 5 // 8, width, False), (8, width, width, True)]
                    for group, head_dim, value_dim, softcap in shapes:
                        arguments = arguments_of(kernel, element, group, head_dim, value_dim, slots, softcap)
                        used = resources(compile_kernel(kernel, arguments, target, warps))
                        name = f"moda_depth_{direction} {element} G{group} d{head_dim} dv{value_dim}"
                        row = {"name": f"{name}{' softcap' if softcap else ''}", "target": target, **used._asdict()}
                        row["shared_limit"] = TARGETS[target][1]
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main([argument for argument in sys.argv[1:] if argument in TARGETS], "--every" in sys.argv)
