"""Parity checks of the GPU suite against the float64 reference on the same device, and their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_cases import FORWARD_BACKWARD, Case, Problem, Row, gradients
from torch import Tensor

#: Relative RMSE of an output, or of all gradients of one name.
#:   op: one op, as in the tests of the ops: one rounding of the result.
#:   attention: the vendor's sequence part rounds weights and their gradients to 16 bits before it multiplies them.
#:   stack: tens of sublayers, each of which rounds. Twice what torch's own ops have with 64 sublayers in Block and 48
#:       in Full AttnRes: 2.8e-2, 3.7e-3 and 1.2e-6.
BOUNDS = {
    torch.bfloat16: {"op": 5e-3, "attention": 1.5e-2, "stack": 6e-2},
    torch.float16: {"op": 6e-4, "attention": 2e-3, "stack": 8e-3},
    torch.float32: {"op": 3e-6, "attention": 1e-5, "stack": 5e-6},
}
#: Factor on the bounds of peers, which may also round keys, queries or partial gradients. A row that exceeds its bound
#: is not timed.
PEER_FACTOR = {"op": 4.0, "attention": 2.0, "stack": 2.0}


def check(row: Row, case: Case, problem: Problem, expected: dict[str, list[Tensor]]) -> dict:
    """Compare outputs and gradients with `expected`; the status is `"ok"` if all are within the bound."""
    first = next(iter(problem.leaves().values()))[0]
    bound = BOUNDS[first.dtype][case.rounding] * (PEER_FACTOR[case.rounding] if row.kind == "peer" else 1.0)
    actual = results(row.solve, problem, FORWARD_BACKWARD in case.passes)
    errors = {name: relative_rmse(actual[name], expected[name]) for name in expected}
    # Python's `max` may ignore NaN.
    worst = torch.tensor(list(errors.values())).max().item()
    return {"ok": worst <= bound, "bound": bound, "worst": worst, "errors": errors, "dtype": str(first.dtype)[6:]}


def results(solve: Any, problem: Problem, with_gradients: bool) -> dict[str, list[Tensor]]:
    """Return outputs, and gradients by the name of their leaves."""
    outputs = list(solve(problem))
    found = {"output": [output.detach() for output in outputs]}
    if with_gradients:
        found |= {f"d {name}": grads for name, grads in gradients(outputs, problem).items()}
    return found


def relative_rmse(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the norm of the difference of two lists of tensors divided by that of `expected` (by 1 if it is zero)."""
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise RuntimeError(f"a result has the shape {tuple(a.shape)} instead of {tuple(e.shape)}")
    error = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    scale = sum(e.double().square().sum() for e in expected)
    return float((error / scale if scale > 0 else error) ** 0.5)
