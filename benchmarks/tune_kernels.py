"""Tune the kernels' configuration tables, which replace autotuning at run time.

    python benchmarks/tune_kernels.py --output benchmarks/results/tune_h200.json [--only "read backward"]
    python benchmarks/tune_kernels.py --compile-only sm_90 --only "read forward" --tiny      no GPU

For every table and bucket of shapes, each candidate is compiled through the op's own launch, and candidates whose
binaries use a stack, local memory or too much shared memory are discarded. The others are timed with a cold cache. The
fastest is printed as a line to paste into the table under the architecture of this GPU. Afterwards, run the parity
checks of `gpu_suite.py` and the tests of the binaries.

To add a table, add a `Table` to tune_tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Clock, Effort, environment
from tune_tables import TABLES, Table, kernel_module

#: Largest number of bytes of shared memory per program, by architecture.
SHARED_LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
NUM_TOKENS = 8192
_EFFORT = Effort(5, 20, 0.2)


class Driver:
    """Mock of a GPU driver, which lets the compiler run without a GPU."""

    def __init__(self, architecture: str):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledLaunches:
    """Replaces a kernel in its module: a launch compiles and stores the binary without running it."""

    def __init__(self, kernel: Any, binaries: list):
        self.kernel, self.binaries = kernel, binaries

    def __getitem__(self, grid: tuple):
        def launch(*arguments, **options) -> None:
            self.binaries.append(self.kernel.run(*arguments, grid=grid, warmup=True, **options))

        return launch


@contextlib.contextmanager
def entry_set(table: Table, bucket: dict, architecture: str, value: Any) -> Iterator[None]:
    """Set one candidate in the table."""
    configs, key = table.entry(bucket, architecture)
    before = dict(configs)
    configs[key] = value
    try:
        yield
    finally:
        configs.clear()
        configs.update(before)


@contextlib.contextmanager
def compiling(table: Table, architecture: str, has_gpu: bool) -> Iterator[list]:
    """Let the kernels of the module compile instead of run; yield the list of their binaries."""
    from triton.runtime.jit import JITFunction

    module = kernel_module(table.module)
    binaries: list[Any] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, JITFunction)}
    replaced: dict[str, Any] = {name: CompiledLaunches(kernel, binaries) for name, kernel in kernels.items()}
    if not has_gpu:
        # Both need a device.
        stand_ins = {"architecture_of": lambda device: architecture, "num_programs": lambda *_: 264}
        replaced |= {name: value for name, value in stand_ins.items() if hasattr(module, name)}
    before = {name: getattr(module, name) for name in replaced}
    for name, value in replaced.items():
        setattr(module, name, value)
    try:
        yield binaries
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def resources(binary: Any) -> dict[str, int]:
    """Return registers, stack, shared memory and local memory accesses of a compiled kernel."""
    shared = int(binary.metadata.shared)
    if "amdgcn" in binary.asm:
        numbers = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", binary.asm["amdgcn"])
        )
        return {
            "registers": int(numbers["vgpr_count"]),
            "stack": int(numbers["private_segment_fixed_size"]),
            "shared": shared,
            "local_accesses": int(numbers["vgpr_spill_count"]),
        }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", _tool("cuobjdump", "--dump-resource-usage", file)))
        code = _tool("nvdisasm", "-c", file)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": max(shared, int(usage["SHARED"])),
        "local_accesses": len(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?:LDL|STL)\b", code, re.MULTILINE)),
    }


def _tool(name: str, *arguments: object) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def reason_against(found: list[dict[str, int]], architecture: str) -> str | None:
    """Return why a candidate is discarded, or `None`."""
    limit = SHARED_LIMITS.get(architecture, min(SHARED_LIMITS.values()))
    for used in found:
        if used["stack"] or used["local_accesses"]:
            return f"spills: stack {used['stack']} bytes, {used['local_accesses']} accesses to local memory"
        if used["shared"] > limit:
            return f"shared memory: {used['shared']} bytes of {limit}"
    return None


def tune(table: Table, bucket: dict, architecture: str, num_tokens: int, clock: Clock | None) -> dict:
    """Compile and, with a clock, time all candidates of one bucket; the fastest is `"best"`."""
    has_gpu = clock is not None
    step = table.step(bucket, num_tokens, clock.device if has_gpu else torch.device("cpu"))
    candidates, best = [], None
    for value in table.candidates(bucket):
        found: dict[str, Any] = {"value": str(value)}
        candidates.append(found)
        with entry_set(table, bucket, architecture, value):
            try:
                with compiling(table, architecture, has_gpu) as binaries:
                    step()
                fitting = [binary for binary in binaries if table.kernel in binary.metadata.name]
                found["resources"] = [resources(binary) for binary in fitting]
                found["discarded"] = reason_against(found["resources"], architecture)
                if has_gpu and found["discarded"] is None:
                    found |= clock.measure(step, _EFFORT)
            # Candidates that the compiler or the driver rejects are discarded.
            except Exception as error:
                found["discarded"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        if "median_s" in found and (best is None or found["median_s"] < best[0]):
            best = found["median_s"], value
    return {
        "table": table.name,
        "bucket": bucket,
        "candidates": candidates,
        "best": None if best is None else table.row(bucket, best[1]),
    }


def _write(path: Path | None, result: dict) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> int:
    """Tune the tables, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="JSON file, rewritten after every bucket")
    parser.add_argument("--only", nargs="+", default=None, help="only tables whose names contain one of these strings")
    parser.add_argument(
        "--compile-only", default=None, metavar="ARCHITECTURE", help="compile without a GPU for sm_80, sm_90 or sm_100"
    )
    parser.add_argument("--tiny", action="store_true", help="only the first bucket of each table, with 16 tokens")
    arguments = parser.parse_args(argv)
    if arguments.compile_only is not None:
        if arguments.compile_only not in ("sm_80", "sm_90", "sm_100"):
            parser.error(f"--compile-only must be sm_80, sm_90 or sm_100, got {arguments.compile_only!r}")
        import triton

        triton.runtime.driver.set_active(Driver(arguments.compile_only))
        clock, architecture = None, arguments.compile_only
    else:
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU; use --compile-only ARCHITECTURE to test the script without one")
        clock = Clock(torch.device("cuda"))
        architecture = kernel_module("launches").architecture_of(clock.device)
    tables = [t for t in TABLES if not arguments.only or any(text in t.name for text in arguments.only)]
    device = clock.device if clock is not None else torch.device("cpu")
    result: dict = {
        "benchmark": "tune_kernels",
        "complete": False,
        "timed": clock is not None,
        "architecture": architecture,
        "environment": environment(device),
        "buckets": [],
    }
    for table in tables:
        for bucket in table.buckets[:1] if arguments.tiny else table.buckets:
            tokens = 16 if arguments.tiny or clock is None else NUM_TOKENS
            found = tune(table, bucket, architecture, tokens, clock)
            result["buckets"].append(found)
            _write(arguments.output, result)
            kept = sum(candidate["discarded"] is None for candidate in found["candidates"])
            text = found["best"] or f"not timed; {kept} of {len(found['candidates'])} candidates fit"
            print(f"{architecture} {table.name} {bucket}: {text}", flush=True)
    result["complete"] = True
    _write(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
