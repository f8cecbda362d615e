"""Inputs of grouped AttnRes reads, and comparisons of results and gradients with those in float64."""

import torch
from tolerances import RELATIVE_RMSE, relative_rmse
from torch import Tensor

EPS = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def upstream(results: list[Tensor]) -> list[Tensor]:
    return [torch.randn(result.shape, dtype=torch.float64).to(result.dtype) for result in results]


def assert_like(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype, factor: float = 1.0) -> None:
    """Compare results with exact ones by the tolerance of `dtype` times `factor`."""
    for i, (result, exact) in enumerate(zip(actual, expected, strict=True)):
        assert result.shape == exact.shape
        error = relative_rmse(result, exact)
        assert error <= factor * RELATIVE_RMSE[dtype], f"result {i}: {error}"
