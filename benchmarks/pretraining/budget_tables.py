"""Tables of arms with several budgets: fits, the bytes that an arm saves, equal CPU time, and best rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from .arms import ARMS
from .cells import Lines, interval_cell, loss_cell, rate_cell, table_lines
from .comparison import difference, fit_power_law, tokens_for_loss
from .group import Group, in_bytes


def budget_table(group: Group) -> Lines:
    """Return the table of other budgets, with fits and the budget that the baseline of an arm needs, or nothing.

    Args:
        group: the results.
    """
    points = {name: found for name in group.arms(is_continued=False) if len(found := group.by_budget(name)) > 1}
    if not points:
        return []
    budgets = sorted({tokens for found in points.values() for tokens, _ in found})
    rows = []
    for name, found in points.items():
        other = group.baseline_of(name)
        baseline = [] if other is None else points.get(other, [])
        cells = [_at_budget(group, name, other, int(tokens)) for tokens in budgets]
        law = fit_power_law(found)
        fit = (
            "fewer than three budgets"
            if law is None
            else (f"{law.factor:.3g} T^-{law.exponent:.3f} (within {100 * law.worst:.1f} %)")
        )
        needed = ", ".join(_needed(baseline, *point) for point in found) if baseline else ""
        rows.append([ARMS[name].label, *cells, fit, needed])
    columns = ["arm", *map(in_bytes, budgets), "fit", "budget of its baseline for the same loss"]
    return table_lines(columns, rows)


def _at_budget(group: Group, name: str, baseline: str | None, tokens: int) -> str:
    """Return the loss with a budget, and the difference to the baseline of the arm."""
    own = group.losses_at_budget(name, tokens)
    if not own:
        return "-"
    loss = loss_cell(statistics.fmean(own.values()))
    other = {} if baseline is None else group.losses_at_budget(baseline, tokens)
    if baseline is None or not other:
        return loss
    note = ", untuned" if group.is_untuned(name, baseline, tokens) else ""
    return f"{loss} ({interval_cell(difference(own, other))}{note})"


def _needed(reference: Sequence[tuple[float, float]], tokens: float, loss: float) -> str:
    needed = tokens_for_loss(reference, loss)
    if needed is not None:
        return f"{needed / tokens:.2f} x"
    return "beyond the largest" if loss < reference[-1][1] else "below the smallest"


def equal_time_by_budget(group: Group) -> Lines:
    """Return the table that compares arms with their baseline trained for longer, for the same CPU time, or nothing.

    Args:
        group: the results.
    """
    rows: dict[tuple[str, str, float], dict[float, str]] = {}
    for name in group.arms(is_continued=False):
        baseline = group.baseline_of(name)
        if baseline is None or len(group.budgets(baseline)) < 2:
            continue
        ratio = group.cost_ratio(name, baseline)
        for tokens in group.budgets(name):
            found = difference(group.losses_at_budget(name, tokens), group.losses_for(baseline, tokens * ratio))
            if found is not None:
                rows.setdefault((name, baseline, ratio), {})[tokens] = interval_cell(found)
    budgets = sorted({tokens for cells in rows.values() for tokens in cells})
    if not budgets:
        return []
    return table_lines(
        ["arm", "baseline", "bytes for it", *map(in_bytes, budgets)],
        (
            [ARMS[name].label, ARMS[baseline].label, f"{ratio:.2f} x", *(cells.get(tokens, "-") for tokens in budgets)]
            for (name, baseline, ratio), cells in rows.items()
        ),
    )


def rates_of_budgets(group: Group) -> Lines:
    """Give the losses of all rates that were tried on seed 0 with other budgets.

    Args:
        group: the results.
    """
    said = []
    for name in group.arms(is_continued=False):
        for tokens in group.budgets(name):
            tried = replace(group, tokens=tokens).tried(name)
            if tokens != group.tokens and len(tried) > 1:
                losses_of = ", ".join(f"{rate_cell(result.run)}: {loss_cell(result.loss)}" for result in tried)
                said.append(f"- {ARMS[name].label}, {in_bytes(tokens)}: {losses_of}.")
    return said


def rates_by_budget(found: Sequence[Group]) -> Lines:
    """Return the table of the best rates of arms that were tuned with several budgets, or nothing.

    Args:
        found: results of one corpus and number of layers.
    """
    best = {name: {group.tokens: group.plan.best(name) for group in found} for name in ARMS}
    rows = {name: runs for name, runs in best.items() if sum(run is not None for run in runs.values()) > 1}
    if not rows:
        return []
    return table_lines(
        ["arm", *(in_bytes(group.tokens) for group in found)],
        (
            [ARMS[name].label, *("-" if run is None else rate_cell(run) for run in runs.values())]
            for name, runs in rows.items()
        ),
    )
