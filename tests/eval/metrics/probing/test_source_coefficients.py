"""`MixedTensor`: every rule against the effect of unit sources."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_depthattn.eval.metrics.probing.source_coefficients import MixedTensor, coefficients_of

SHAPE = (2, 3, 4)
PLAIN = torch.arange(1.0, 25.0, dtype=torch.float64).view(SHAPE) / 7
GATE = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3, 1)
MATRIX = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 5

#: Functions of two sources, affine in them.
AFFINE = {
    "sum": lambda x, y: x + 2 * y - y / 4,
    "reversed": lambda x, y: 1 - (3 * x) + sum([y, x]),
    "with constants": lambda x, y: x + PLAIN - (PLAIN - y) + 5,
    "alpha": lambda x, y: torch.sub(torch.add(x, y, alpha=3), PLAIN, alpha=2),
    "gated": lambda x, y: GATE * x + (1 - GATE) * y,
    "lerp": lambda x, y: torch.lerp(x, torch.lerp(PLAIN, y, GATE), GATE),
    "addcmul": lambda x, y: torch.addcmul(x, GATE, y, value=2),
    "addcmul of plain": lambda x, y: torch.addcmul(torch.addcmul(PLAIN, y, GATE), GATE, x),
    "addcmul with plain": lambda x, y: torch.addcmul(x, GATE, PLAIN) + y,
    "baddbmm": lambda x, y: torch.baddbmm(x, PLAIN @ PLAIN.mT, y),
    "streams": lambda x, y: torch.stack([x, y], -2).mul(PLAIN[:1, :1, :2, None]).sum(-2),
    "mixed streams": lambda x, y: (PLAIN[..., :2].mT.softmax(-1)[:, None, :, :2] @ torch.stack([x, y], -2))[..., 0, :],
    "einsum": lambda x, y: torch.einsum("btn,btnd->btd", GATE.expand(2, 3, 2), torch.stack([x, y], -2)),
    "heads": lambda x, y: (x.unflatten(-1, (2, 2)) * GATE[..., None] + y.view(2, 3, 2, 2)).flatten(-2),
    "split": lambda x, y: torch.cat([part * 2 for part in torch.cat([x, y], -1).split([3, 5], -1)], -1)[..., 2:6],
    "unbind": lambda x, y: torch.stack([row - y[:, 0] for row in x.unbind(1)], 1),
    "expanded": lambda x, y: x.unsqueeze(-2).expand(-1, -1, 5, -1).mean(-2) + y.transpose(0, 1).transpose(0, 1),
    "cast": lambda x, y: x.to(torch.float64).double() + y.type_as(PLAIN),
    "linear": lambda x, y: F.linear(x[:, :1].expand_as(x), torch.diag(MATRIX[0]), MATRIX[1]) + y,
    "constant alone": lambda x, y: PLAIN * 2 + 0 * x + 0 * y,
}


def sources() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("function", AFFINE.values(), ids=AFFINE)
def test_coefficients_are_the_effect_of_unit_sources(function):
    values = sources()
    mixed = function(*(MixedTensor.source(value, index, 2) for index, value in enumerate(values)))
    zeros, ones = torch.zeros(SHAPE, dtype=torch.float64), torch.ones(SHAPE, dtype=torch.float64)
    constant = function(zeros, zeros)
    expected = torch.stack([function(ones, zeros) - constant, function(zeros, ones) - constant, constant])
    torch.testing.assert_close(coefficients_of(mixed), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(mixed.as_subclass(Tensor), function(*values))


def test_nonlinear_functions_are_frozen_factors():
    x, y = sources()
    mixed_x, mixed_y = MixedTensor.source(x, 0, 2), MixedTensor.source(y, 1, 2)
    gate = torch.sigmoid(F.linear(mixed_x, MATRIX[:1]))
    weights = torch.stack([(mixed_x * MATRIX[0]).sum(-1), (mixed_y * MATRIX[1]).sum(-1)], -1).softmax(-1)
    assert not any(isinstance(plain, MixedTensor) for plain in (gate, weights, mixed_x * mixed_y, mixed_x.square()))
    read = gate * mixed_x + weights[..., 1:] * mixed_y
    expected = torch.stack([gate.expand(SHAPE), weights[..., 1:].expand(SHAPE), torch.zeros(SHAPE)])
    torch.testing.assert_close(coefficients_of(read), expected.double())
    with pytest.raises(ValueError, match="x: is a plain tensor"):
        coefficients_of(gate)


@pytest.mark.parametrize("weight", [None, MATRIX[0]])
def test_norms_multiply_by_their_rms(weight):
    x, y = sources()
    total = MixedTensor.source(x, 0, 2) * 3 + MixedTensor.source(y, 1, 2)
    normed = F.rms_norm(total, (4,), weight, 1e-3)
    factor = ((3 * x + y).square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (1 if weight is None else weight)
    torch.testing.assert_close(coefficients_of(normed)[0], 3 * factor.expand(SHAPE))
    found = coefficients_of(normed)
    torch.testing.assert_close(found[0] * x + found[1] * y, normed.as_subclass(Tensor))


def test_coefficients_of_half_precision_tensors_are_exact():
    x, y = (value.bfloat16() for value in sources())
    mixed = (MixedTensor.source(x, 0, 2) + MixedTensor.source(y, 1, 2)) * 0.3
    assert torch.equal(coefficients_of(mixed)[:2], torch.full((2, *SHAPE), 0.3, dtype=torch.float64))
