"""Cells of the tables of the study."""

from __future__ import annotations

import math

from .comparison import Difference
from .runs import Run

Lines = list[str]


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
