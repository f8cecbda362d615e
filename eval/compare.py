"""`depthattn eval --compare`: two runs of tasks, or two of perplexity."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .harness.compare import RunComparison, compare_runs
from .perplexity_compare import PerplexityComparison, compare_perplexity, report_of


def compare(run_a: Path, run_b: Path) -> RunComparison | PerplexityComparison:
    """Compare two runs of the same kind.

    Args:
        run_a: the baseline: a folder of results, or a file of `--perplexity`.
        run_b: the other one.

    Raises:
        UserError: a run is missing, the kinds differ, or what they have scored differs.
    """
    for run in (run_a, run_b):
        if not run.exists():
            raise UserError(f"{run}: no such folder or file.")
    reports = report_of(run_a), report_of(run_b)
    if reports[0] is not None and reports[1] is not None:
        return compare_perplexity(reports[0], reports[1])
    if reports != (None, None):
        with_one, without = (run_a, run_b) if reports[0] is not None else (run_b, run_a)
        raise UserError(f"{with_one}: is a run of --perplexity, {without} is not; give two runs of one kind.")
    return compare_runs(run_a, run_b)
