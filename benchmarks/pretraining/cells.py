"""Tables of the study in Markdown, and their cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .comparison import Difference
from .runs import Run

Lines = list[str]


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """Return the lines of a table.

    Args:
        columns: the heads of its columns.
        rows: the cells of each row.
    """
    body = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body]


def rate_cell(run: Run) -> str:
    factor = "" if run.depth_lr_factor == 1 else f", depth x {run.depth_lr_factor:g}"
    return f"{run.learning_rate:g}{factor}"


def loss_cell(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def interval_cell(found: Difference | None) -> str:
    if found is None:
        return "-"
    if found.num_seeds == 1:
        return f"{found.paired.difference:+.3f} (one seed)"
    return f"{found.paired.difference:+.3f} ± {found.half_width:.3f}{' (mid-run)' if found.is_mid_run else ''}"
