"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """What a kernel was to write and did not is NaN; every test starts from the same seed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def other_gpu(monkeypatch, tmp_path) -> None:
    """Kernels are compiled for GPUs that are not there: Triton's driver, and its cache, are back afterwards."""
    import triton

    monkeypatch.setattr(triton.runtime.driver, "_active", triton.runtime.driver._active)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture
def check_binary(other_gpu, request) -> Callable[..., None]:
    """A function that takes a target and what its binary needs: nothing spills, and no number has grown.

    With `max_stack`, the binary may have a stack of so many bytes per thread, and 1.5 % of its instructions may access
    it. With `--record-binaries` the numbers are written to the table instead of compared with it.
    """
    from compiled_kernels import TARGETS, check_growth, record

    def check(target: str, row: Mapping[str, Any], max_stack: int = 0) -> None:
        max_accesses = 0.015 * row["instructions"] if max_stack else 0
        assert row["stack"] <= max_stack and row["local_accesses"] <= max_accesses, row
        assert row["shared"] <= TARGETS[target].shared_bytes, row
        (record if request.config.getoption("--record-binaries") else check_growth)(target, row)

    return check
