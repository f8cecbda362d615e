"""Refusing second derivatives of ops whose backward is not differentiable."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def first_derivatives(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients, such that with `create_graph=True` their derivatives by the inputs raise an error.

    `once_differentiable` only considers incoming gradients: a gradient that depends on none of them would be treated
    as a constant.

    Args:
        gradients: gradients that were computed without a graph.
        inputs: everything that they depend on: inputs of the op and incoming gradients.
    """
    tensors = [tensor for tensor in inputs if tensor is not None]
    return tuple(None if gradient is None else _FirstDerivative.apply(gradient, *tensors) for gradient in gradients)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: object) -> NoReturn:
        raise RuntimeError("AttnRes reads have no second derivatives; use `attn_res_read_reference` to compute them")
