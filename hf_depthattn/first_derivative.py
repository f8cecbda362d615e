"""Refusing second derivatives of ops whose backward is not differentiable."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def first_derivative(gradient: Tensor, *inputs: Tensor) -> Tensor:
    """Return the gradient, such that with `create_graph=True` its derivative by the inputs raises an error.

    `once_differentiable` only considers incoming gradients: the gradient of a source that is only used by reads, which
    has no incoming gradient, would be treated as a constant.
    """
    return _FirstDerivative.apply(gradient, *inputs) if torch.is_grad_enabled() else gradient


def first_derivatives(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return `first_derivative` of every gradient that is not None."""
    return tuple(None if gradient is None else first_derivative(gradient, *inputs) for gradient in gradients)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: object) -> NoReturn:
        raise RuntimeError("AttnRes reads have no second derivatives; use `attn_res_read_reference` to compute them")
