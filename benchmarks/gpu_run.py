"""Run the rows of a case: parity, then timing of correct rows; errors of a row are recorded, not raised."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_parity
import torch
from gpu_cases import FORWARD, Absent, Case, Problem, Row
from gpu_timing import Clock, Effort, OutOfTime, captured, time_limit

#: Time limit of one row in seconds, including compilation and autotuning.
ROW_SECONDS = 60.0
SLOW_ROW_SECONDS = 120.0
#: Dtypes of parity checks; peers are only checked in the first, which is timed.
PARITY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Dtypes of parity checks of stacks, where float16 adds no information.
PARITY_STACK_DTYPES = (torch.bfloat16, torch.float32)


def guarded(run: Callable[[], dict], seconds: float) -> dict:
    """Return the result of `run` with the status "ok", or the status and reason of its failure."""
    try:
        with time_limit(seconds):
            return {"status": "ok", **run()}
    except Absent as error:
        return {"status": "absent", "reason": str(error)}
    except OutOfTime as error:
        return {"status": "no time", "reason": str(error)}
    except torch.OutOfMemoryError:
        return {"status": "failed", "reason": "out of memory"}
    # Peers may raise anything, which must not end the run.
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    finally:
        if torch.cuda.is_available():
            # The traceback keeps the tensors of the row alive.
            gc.collect()
            torch.cuda.empty_cache()


def row_parity(row: Row, case: Case, device: torch.device) -> dict:
    """Check the parity of one row in every dtype; the status is `"ok"` if it holds in all."""
    dtypes: tuple[torch.dtype, ...] = PARITY_STACK_DTYPES if case.rounding == "stack" else PARITY_DTYPES
    if row.kind != "ours":
        dtypes = dtypes[:1]
    by_dtype = []
    for dtype in dtypes:
        problem = case.make({**case.setting, **case.parity_setting}, dtype, device)
        exact = problem.double()
        expected = gpu_parity.results(case.reference, exact, len(case.passes) > 1)
        by_dtype.append(gpu_parity.check(row, case, problem, expected))
    return {"ok": all(found["ok"] for found in by_dtype), "by_dtype": by_dtype}


def step_of(row: Row, problem: Problem, which: str) -> Callable[[], object]:
    """Return the timed step: outputs without autograd, or outputs and gradients of all leaves."""
    solve = row.solve
    assert solve is not None, "rows in a process of their own are timed there"
    if which == FORWARD:

        def forward():
            with torch.no_grad():
                return solve(problem)

        return forward
    leaves = [leaf for group in problem.leaves().values() for leaf in group]

    def forward_backward():
        outputs = solve(problem)
        return torch.autograd.grad(outputs, leaves, problem.cotangents, allow_unused=True)

    return forward_backward


def measure_row(row: Row, case: Case, problem: Problem, clock: Clock, effort: Effort) -> dict:
    """Time every pass of one row."""
    passes = {}
    for which in case.passes:
        step = step_of(row, problem, which)
        graph = captured(step, clock.device) if case.in_graph else None
        passes[which] = {**clock.measure(graph or step, effort), "in_graph": graph is not None}
    return {"passes": passes}


def run_parity(case: Case, device: torch.device, left: Callable[[], float]) -> dict[str, dict]:
    """Return the parity of each row; rows in a separate process report theirs together with their times."""
    found = {}
    for row in case.rows:
        if row.elsewhere is not None:
            continue
        if not row.checks_parity:
            found[row.name] = {"status": "not checked"}
        elif row.slow_to_compile:
            found[row.name] = {"status": "not checked", "reason": "the reference itself, compiled for one shape"}
        else:
            found[row.name] = guarded(partial(row_parity, row, case, device), min(ROW_SECONDS, left()))
    return found


def run_times(
    case: Case, parity: dict[str, dict], wrong: set[str], clock: Clock, left: Callable[[], float], effort: Effort
) -> list[dict]:
    """Time the rows of a case and return them as JSON values in the order of the case.

    Args:
        case: the case.
        parity: result of `run_parity`.
        wrong: rows with wrong results in any case, which are not timed.
        clock: clock of the device.
        left: function that returns the seconds left for this part.
        effort: number of repetitions.
    """
    built = guarded(lambda: {"problem": case.make(case.setting, PARITY_DTYPES[0], clock.device)}, left())
    rows = {}
    for row in sorted(case.rows, key=lambda row: (row.elsewhere is not None, row.slow_to_compile)):
        checked = parity.get(row.name, {"status": "not checked"})
        found: dict[str, Any] = {"name": row.name, "kind": row.kind, "parity": checked}
        seconds = min(SLOW_ROW_SECONDS if row.slow_to_compile or row.elsewhere else ROW_SECONDS, left())
        if "problem" not in built:
            found |= built
        elif row.elsewhere is not None:
            found |= guarded(partial(row.elsewhere, case), seconds)
            checked = found["parity"]
        elif checked["status"] in ("ok", "not checked"):
            if row.name not in wrong:
                found |= guarded(partial(measure_row, row, case, built["problem"], clock, effort), seconds)
        else:
            # Absent, failed or timed out in the parity check: do not try again.
            found |= checked
        if checked.get("ok") is False or row.name in wrong:
            found |= {"status": "wrong", "reason": "parity failed: not timed"}
            found.pop("passes", None)
        rows[row.name] = found
    return [rows[row.name] for row in case.rows]
