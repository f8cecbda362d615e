"""Helpers of the tests of the GPU suite: its modules, dry runs, and a mock GPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from repository import ROOT, SUPPORT

BENCHMARKS = ROOT / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def module(name: str):
    return importlib.import_module(name)


def python_path() -> str:
    spec = importlib.util.find_spec("triton")
    found = [] if spec is None else [Path(spec.origin).parent.parent]
    return os.pathsep.join(map(str, (ROOT, BENCHMARKS, SUPPORT, *found)))


def dry_run(*arguments: str, output: Path) -> tuple[int, dict]:
    code = module("gpu_suite").main(["--dry-run", *arguments, "--output", str(output)])
    return code, json.loads(output.read_text())


def rows_of(result: dict, case: str) -> dict[str, dict]:
    return {row["name"]: row for found in result["cases"] if case in found["name"] for row in found["rows"]}


class FakeEvent:
    """Event of a mock GPU on which every step takes 2 ms."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 2.0


class FakeGraph:
    """Records what is captured, and fails on request of a test."""

    replayed = 0

    def replay(self):
        FakeGraph.replayed += 1


def stand_in_gpu(monkeypatch):
    """Mock the parts of `torch.cuda` that a clock needs; tensors stay on the CPU."""
    timing, empty = module("gpu_timing"), torch.empty
    fakes = {
        "Event": FakeEvent,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
        "Stream": lambda device: types.SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: types.SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
        "get_device_properties": lambda device: types.SimpleNamespace(
            name="NVIDIA H200", total_memory=1, multi_processor_count=132
        ),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 8)
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(*shape, **options))
    return types.SimpleNamespace(type="cuda")
