"""Helpers of the tests of Triton kernels: dtypes, cases, inputs of AttnRes reads, comparisons.

Test modules that import this one are skipped if Triton is not installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor

from hf_depthattn.kernels.row_tiles import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")

EPS = 1e-6
TARGETS = ("sm_80", "sm_90", "sm_100")
DEVICE = "cpu" if INTERPRETED else "cuda"

# Compiled kernels do not support float64, and Triton's interpreter does not compute correctly in bfloat16.
in_every_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, marks=pytest.mark.interpreted, id="float64"),
        pytest.param(torch.float32, marks=[pytest.mark.interpreted, pytest.mark.on_gpu], id="float32"),
        pytest.param(torch.float16, marks=[pytest.mark.interpreted, pytest.mark.on_gpu], id="float16"),
        pytest.param(torch.bfloat16, marks=pytest.mark.on_gpu, id="bfloat16"),
    ],
)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on")


def binary_cases(few: Sequence[Any], some: Sequence[Any] = (), *, targets: Iterable[str]) -> list:
    """Return parameters (target, case) of a test of binaries; all but `few` on sm_90 and sm_100 are slow.

    Args:
        few: cases for every target.
        some: further cases for sm_90.
        targets: names of targets.
    """
    params = []
    for target in targets:
        for case in dict.fromkeys([*few, *some] if target == "sm_90" else few):
            is_quick = target in ("sm_90", "sm_100") and case in few
            params.append(
                pytest.param(target, case, id=f"{target}-{case}", marks=() if is_quick else pytest.mark.slow)
            )
    return params


def read_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the sources and the score weight of a read with shape (tokens, channels, sources)."""
    num_tokens, num_channels, num_sources = shape
    generator = torch.Generator().manual_seed(hash(shape))
    draw = {"generator": generator, "dtype": torch.float64}
    sources = [
        (torch.randn(1, num_tokens, num_channels, **draw) * (1 + i)).to(DEVICE, dtype).requires_grad_()
        for i in range(num_sources)
    ]
    weight = torch.randn(num_channels, **draw) * num_channels**-0.5
    return sources, weight.to(DEVICE, wide(dtype)).requires_grad_()


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a random leaf on the device."""
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the accumulation dtype for tensors of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def doubles(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return float64 copies that are leaves."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def check_close(label: str, dtype: torch.dtype, actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Assert that the error of each result is within the tolerance of the dtype."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = relative_rmse(a, b)
        assert error <= RELATIVE_RMSE[dtype], f"{label}: result {i} is off by {error:.1e}"
