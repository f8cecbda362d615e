"""Sinkhorn normalisation: its constraints, and the op against the reference."""

import pytest
import torch
from tolerances import RELATIVE_RMSE, relative_rmse

from hf_depthattn.sinkhorn_ops import sinkhorn, sinkhorn_reference


def slow_sinkhorn(logits, num_iters):
    """Matrix by matrix and sum by sum."""
    n, _, tokens = logits.shape
    result = []
    for t in range(tokens):
        matrix = [[logits[r, c, t].exp() for c in range(n)] for r in range(n)]
        for _ in range(num_iters):
            matrix = [[entry / sum(row) for entry in row] for row in matrix]
            columns = [[entry / sum(column) for entry in column] for column in zip(*matrix, strict=True)]
            matrix = [list(row) for row in zip(*columns, strict=True)]
        result.append(torch.stack([torch.stack(row) for row in matrix]))
    return torch.stack(result, -1)


@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_reference])
@pytest.mark.parametrize("n, num_iters", [(2, 1), (3, 2), (4, 5)])
def test_op_and_reference_equal_the_loops(function, n, num_iters):
    logits = torch.randn(n, n, 3, dtype=torch.float64).requires_grad_()
    actual, expected = function(logits, num_iters), slow_sinkhorn(logits, num_iters)
    cotangent = torch.randn_like(actual)
    gradients = [torch.autograd.grad(result, logits, cotangent)[0] for result in (actual, expected)]
    assert relative_rmse(actual, expected) < RELATIVE_RMSE[torch.float64]
    assert relative_rmse(*gradients) < RELATIVE_RMSE[torch.float64]


def test_float32_op_equals_the_reference_in_float64():
    logits = torch.randn(4, 4, 63, requires_grad=True)
    cotangent = torch.randn(4, 4, 63)
    exact = logits.detach().double().requires_grad_()
    actual, expected = sinkhorn(logits, 20), sinkhorn_reference(exact, 20)
    assert relative_rmse(actual, expected) < RELATIVE_RMSE[torch.float32]
    (gradient,) = torch.autograd.grad(actual, logits, cotangent)
    (exact_gradient,) = torch.autograd.grad(expected, exact, cotangent.double())
    assert relative_rmse(gradient, exact_gradient) < RELATIVE_RMSE[torch.float32]


def test_second_derivatives():
    logits = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: sinkhorn(x, 3), logits)


def test_columns_sum_to_one_and_rows_approach_it():
    logits = torch.randn(4, 4, 63, dtype=torch.float64)
    errors = []
    for num_iters in (1, 20):
        matrices = sinkhorn(logits, num_iters)
        torch.testing.assert_close(matrices.sum(0), torch.ones(4, 63, dtype=torch.float64), rtol=0, atol=1e-15)
        errors.append((matrices.sum(1) - 1).abs().max().item())
    assert errors[1] < 0.1 * errors[0]


def test_extreme_logits_give_finite_numbers():
    logits = (200 * torch.randn(4, 4, 63)).requires_grad_()
    matrices = sinkhorn(logits, 20)
    matrices.square().sum().backward()
    assert matrices.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(matrices.sum(0), torch.ones(4, 63))
