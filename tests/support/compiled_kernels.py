"""Compile kernels without a GPU, and read the resources that their binaries need.

`compile_kernel` compiles a Triton function ahead of time from a description of its arguments; `resources` reads
registers, stack and shared memory from the binary and counts the instructions of its disassembly. The tools are part
of Triton. Resources are read from the binary itself, since a second compilation with other options may differ.

`KNOWN` is a committed table of such numbers (Triton version -> target -> name of the binary -> number -> value) that
reveals changes which make kernels slower. `check_growth` compares with it; `record` writes it, for

    pytest tests/kernels -m "slow or not slow" -k binaries --record-binaries
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from repository import DATA
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Target(NamedTuple):
    """A GPU and its limit of shared memory per program."""

    gpu: GPUTarget
    shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65536),
}

KNOWN = DATA / "kernel_instructions.json"
GUARDED = ("registers", "instructions_per_element")
MAX_GROWTH = 0.10


class Constant(NamedTuple):
    """A compile-time constant argument."""

    value: Any


class Pointer(NamedTuple):
    """A pointer to elements of a Triton type such as `"bf16"`; aligned to 16 bytes, as torch allocates."""

    element: str


class Resources(NamedTuple):
    """Resources of a compiled kernel.

    Attributes:
        registers: registers per thread.
        stack: bytes of stack per thread, including register spills.
        shared: bytes of shared memory per program.
        local_accesses: instructions that load from or store to local memory.
        instructions: static number of instructions of the kernel.
    """

    registers: int
    stack: int
    shared: int
    local_accesses: int
    instructions: int


class _Driver:
    """Mock of a GPU driver, from which launches and `tl.target_info` get the target."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # No GPU has this index, so Triton's cache for it is never used for a launch.
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledLaunches:
    """Replaces a kernel: `launches[grid](...)` binds and compiles like a launch, but does not run.

    Attributes:
        binaries: hashes of the binaries that the launches would have run.
        num_launches: number of launches.
    """

    def __init__(self, kernel, target: str):
        self.kernel, self.binaries, self.num_launches = kernel, set(), 0
        triton.runtime.driver.set_active(_Driver(TARGETS[target].gpu))

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.num_launches += 1
            self.binaries.add(self.kernel.run(*arguments, grid=grid, warmup=True, **options).hash)

        return launch


def compile_kernel(kernel, arguments: Mapping[str, Any], target: str, num_warps: int, **launch_options: Any):
    """Compile a `@triton.jit` function.

    Args:
        kernel: the function.
        arguments: a `Constant`, a `Pointer`, a tuple of pointers, or the name of a scalar type for each argument.
        target: key of `TARGETS`.
        num_warps, launch_options: as at a launch.
    """
    assert list(arguments) == kernel.arg_names, (list(arguments), kernel.arg_names)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    aligned = [["tt.divisibility", 16]]
    for i, (name, argument) in enumerate(arguments.items()):
        if isinstance(argument, Constant):
            signature[name] = "constexpr"
            constants[(i,)] = argument.value
        elif isinstance(argument, Pointer):
            signature[name] = f"*{argument.element}"
            attributes[(i,)] = aligned
        elif isinstance(argument, tuple):
            signature[name] = tuple(f"*{pointer.element}" for pointer in argument)
            attributes |= {(i, j): aligned for j in range(len(argument))}
        else:
            signature[name] = argument
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True, **launch_options}
    gpu = TARGETS[target].gpu
    triton.runtime.driver.set_active(_Driver(gpu))
    return triton.compile(source, target=gpu, options=options)


def resources(compiled) -> Resources:
    """Read the resources of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        return _amd_resources(compiled)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        code = _tool("nvdisasm", "-c", str(binary))
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage))
    opcodes = re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    # The code after the last branch to itself is padding.
    opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
    assert opcodes, "no instruction was found in the disassembly"
    local = sum(re.match(r"(LDL|STL)\b", opcode) is not None for opcode in opcodes)
    shared = max(int(found["SHARED"]), compiled.metadata.shared)
    return Resources(int(found["REG"]), int(found["STACK"]), shared, local, len(opcodes))


def instructions_per_element(target: str, used: Resources, num_warps: int, num_elements: int) -> float:
    """Return the instructions of all threads of a program per element that it processes."""
    threads = num_warps * TARGETS[target].gpu.warp_size
    return round(used.instructions * threads / num_elements, 2)


def check_growth(target: str, row: Mapping[str, Any]) -> None:
    """Compare a row with the table by its `name`; skip versions, targets and names that are not in the table."""
    known = _known().get(triton.__version__, {}).get(target, {})
    for number, value in known.get(row["name"], {}).items():
        assert row[number] <= value * (1 + MAX_GROWTH), f"{target} {row['name']}: {number} {value} -> {row[number]}"


def record(target: str, row: Mapping[str, Any]) -> None:
    """Write the numbers of a row to the table under the current Triton version; not safe for concurrent processes."""
    table = _known()
    names = table.setdefault(triton.__version__, {}).setdefault(target, {})
    names[row["name"]] = {number: row[number] for number in GUARDED if number in row}
    KNOWN.parent.mkdir(exist_ok=True)
    KNOWN.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _known() -> dict:
    return json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.is_file() else {}


def _amd_resources(compiled) -> Resources:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    opcodes = re.findall(r"^\t([a-z]+_\w+)", code, re.MULTILINE)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    stack = number("private_segment_fixed_size")
    return Resources(number("vgpr_count"), stack, compiled.metadata.shared, spills, len(opcodes))


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout
