"""Tables of the study in Markdown, and sentences that say what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .arms import ARMS, REFERENCE, SCALED
from .comparison import (
    Difference,
    difference,
    fit_power_law,
    loss_for_tokens,
    losses,
    tokens_for_loss,
)
from .group import Group, in_bytes
from .runs import Run

Lines = list[str]


_ARM_COLUMNS = (
    *("arm", "parameters", "peak rate", "held-out loss", "seeds"),
    *("baseline", "difference", "CPU time", "at equal CPU time"),
)
_SCALED_COLUMN = "difference to scaled PreNorm"


def arm_table(group: Group, *, is_continued: bool = False) -> Lines:
    """Return the table of arms: losses, differences at equal tokens and at equal CPU time.

    Args:
        group: the results.
        is_continued: arms that continue a trained model, instead of those trained from scratch.
    """
    # All arms from scratch saw the same data; continued models saw more.
    has_scaled = not is_continued and group.plan.best(SCALED) is not None
    columns = (*_ARM_COLUMNS, _SCALED_COLUMN) if has_scaled else _ARM_COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in group.arms(is_continued=is_continued):
        arm, results = ARMS[name], group.of_seeds(name)
        loss = statistics.fmean(result.loss for result in results)
        cells = [arm.label, f"{results[0].parameters:,}", _rate(results[0].run), _loss(loss), str(len(results))]
        if name == arm.baseline:
            cells += ["", "", "1.00", ""]
        elif group.plan.best(arm.baseline) is None:
            cells += [ARMS[arm.baseline].label, "not trained yet", "", ""]
        else:
            cells += [
                ARMS[arm.baseline].label,
                _interval(group.at_equal_tokens(name)),
                f"{group.cost_ratio(name):.2f}",
                _interval(group.at_equal_time(name)),
            ]
        if has_scaled:
            cells.append(_interval(group.to_scaled(name)) if name != SCALED else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def arm_sentences(group: Group, *, is_continued: bool = False) -> Lines:
    """Say of every arm whether it is better than its baseline.

    Args:
        group: the results.
        is_continued: as in `arm_table`.
    """
    said = []
    for name in group.arms(is_continued=is_continued):
        arm = ARMS[name]
        if name == arm.baseline or group.plan.best(arm.baseline) is None:
            continue
        baseline = ARMS[arm.baseline].label
        tokens, time = group.at_equal_tokens(name), group.at_equal_time(name)
        said.append(f"- **{arm.label}** against {baseline}: {_sentence(tokens)}; at equal CPU time {_sentence(time)}.")
    return said


def _sentence(found: Difference | None) -> str:
    if found is None:
        return "no comparison, as a run diverged"
    size = f"{abs(found.paired.difference):.3f} nats per byte"
    if found.num_seeds == 1:
        return f"{size} {'lower' if found.paired.difference < 0 else 'higher'} on one seed, which decides nothing"
    if found.verdict == "undecided":
        return f"not decided ({_interval(found)} nats per byte)"
    return f"{found.verdict} by {size} ({_interval(found)})"


def summary(group: Group) -> Lines:
    """Say which arms, trained from scratch, are better, worse and not decided, at equal tokens and at equal CPU time.

    Args:
        group: the results.
    """
    lines = []
    names = [name for name in group.arms(is_continued=False) if name != ARMS[name].baseline]
    with_baseline = [name for name in names if group.plan.best(ARMS[name].baseline) is not None]
    conditions = {
        "equal tokens": {name: group.at_equal_tokens(name) for name in with_baseline},
        "equal CPU time": {name: group.at_equal_time(name) for name in with_baseline},
    }
    if group.plan.best(SCALED) is not None:
        of_others = {name: group.to_scaled(name) for name in (REFERENCE, *names) if name != SCALED}
        conditions[f"equal tokens, all against {ARMS[SCALED].label}"] = of_others
    for condition, differences in conditions.items():
        by_verdict: dict[str, Lines] = {}
        for name, found in differences.items():
            baseline = ARMS[name].baseline
            against = "" if baseline == REFERENCE or "," in condition else f" (against {ARMS[baseline].label})"
            verdict = "diverged" if found is None else found.verdict
            by_verdict.setdefault(verdict, []).append(f"{ARMS[name].label}{against}")
        if by_verdict:
            said = [
                f"{words}: {', '.join(by_verdict[verdict])}"
                for verdict, words in _VERDICTS.items()
                if verdict in by_verdict
            ]
            lines.append(f"- At {condition}: {'; '.join(said)}.")
    return lines


#: Verdict -> words before the names of arms.
_VERDICTS = {
    "better": "better than the baseline",
    "worse": "worse",
    "undecided": "not decided",
    "diverged": "not compared, as a run diverged",
}


def rate_table(group: Group) -> Lines:
    """Return the table of the rates that were tried on seed 0.

    Args:
        group: the results.
    """
    lines = ["| arm | held-out loss by peak rate, seed 0 |", "|---|---|"]
    for name in ARMS:
        tried = group.tried(name)
        if tried:
            best = min(tried, key=lambda result: result.loss)
            cells = [
                f"{_rate(r.run)}: {'**' if r is best else ''}{_loss(r.loss)}{'**' if r is best else ''}" for r in tried
            ]
            lines.append(f"| {ARMS[name].label} | {', '.join(cells)} |")
    return lines


def best_rates(group: Group) -> Lines:
    """Return the table of best rates, and of what the best rate of the reference arm costs the others.

    Args:
        group: the results.
    """
    reference = group.plan.best(REFERENCE)
    assert reference is not None, "a group has a reference"
    lines = [
        f"| arm | best peak rate | held-out loss | with the rate of {ARMS[REFERENCE].label} ({_rate(reference)}) |",
        "|---|---|---|---|",
    ]
    for name in group.arms(is_continued=False):
        best = group.plan.best(name)
        assert best is not None, "it is among the arms with a best rate"
        same_rate = group.results.get(replace(best, learning_rate=reference.learning_rate))
        shown = "not tried" if same_rate is None else _loss(same_rate.loss)
        lines.append(f"| {ARMS[name].label} | {_rate(best)} | {_loss(group.results[best].loss)} | {shown} |")
    return lines


def depth_table(group: Group) -> Lines:
    """Return the table of other numbers of layers, or nothing if there are none.

    Args:
        group: the results.
    """
    depths = sorted({run.num_layers for run in group.results if _is_other_depth(run, group)} | {group.num_layers})
    if len(depths) == 1:
        return []
    lines = [f"| arm | {' | '.join(f'{depth} layers' for depth in depths)} |", "|---" * (1 + len(depths)) + "|"]
    for name in group.arms(is_continued=False):
        cells = []
        for depth in depths:
            own, baseline = (
                losses(group.found(group.plan.at_depth(arm, depth))) for arm in (name, ARMS[name].baseline)
            )
            shown = _loss(statistics.fmean(own.values())) if own else "-"
            if own and name != ARMS[name].baseline:
                shown += f" ({_interval(difference(own, baseline))})"
            cells.append(shown)
        if cells.count("-") < len(depths) - 1:
            lines.append(f"| {ARMS[name].label} | {' | '.join(cells)} |")
    return lines


def _is_other_depth(run: Run, group: Group) -> bool:
    return (run.corpus, run.tokens) == (group.corpus, group.tokens) and run.num_layers != group.num_layers


def budget_table(group: Group) -> Lines:
    """Return the table of other budgets, with fits and the budget that the baseline of an arm needs, or nothing.

    Args:
        group: the results.
    """
    points = {name: found for name in group.arms(is_continued=False) if len(found := group.by_budget(name)) > 1}
    if not points:
        return []
    budgets = sorted({tokens for found in points.values() for tokens, _ in found})
    lines = [
        f"| arm | {' | '.join(map(in_bytes, budgets))} | fit | budget of its baseline for the same loss |",
        "|---" * (3 + len(budgets)) + "|",
    ]
    for name, found in points.items():
        baseline = points.get(ARMS[name].baseline, [])
        is_compared = bool(baseline) and name != ARMS[name].baseline
        cells = [_at_budget(group, name, tokens, dict(found), compare=is_compared) for tokens in budgets]
        law = fit_power_law(found)
        fit = (
            "fewer than three budgets"
            if law is None
            else (f"{law.factor:.3g} T^-{law.exponent:.3f} (within {100 * law.worst:.1f} %)")
        )
        needed = ", ".join(_needed(baseline, *point) for point in found) if is_compared else ""
        lines.append(f"| {ARMS[name].label} | {' | '.join(cells)} | {fit} | {needed} |")
    return lines


def _at_budget(group: Group, name: str, tokens: float, by_budget: Mapping[float, float], *, compare: bool) -> str:
    """Return the loss with a budget, and the difference to the baseline of the arm."""
    if tokens not in by_budget:
        return "-"
    own, baseline = (
        losses(group.found(group.plan.at_budget(arm, int(tokens)))) for arm in (name, ARMS[name].baseline)
    )
    loss = _loss(by_budget[tokens])
    return f"{loss} ({_interval(difference(own, baseline))})" if compare and baseline else loss


def _needed(reference: Sequence[tuple[float, float]], tokens: float, loss: float) -> str:
    needed = tokens_for_loss(reference, loss)
    if needed is not None:
        return f"{needed / tokens:.2f} x"
    return "beyond the largest" if loss < reference[-1][1] else "below the smallest"


def equal_time_by_budget(group: Group) -> Lines:
    """Compare arms with their baseline trained for longer, where a larger budget covers their CPU time.

    Args:
        group: the results.
    """
    said = []
    for name in group.arms(is_continued=False):
        baseline = ARMS[name].baseline
        points = group.by_budget(baseline)
        if name == baseline or len(points) < 2:
            continue
        ratio = group.cost_ratio(name)
        longer = loss_for_tokens(points, group.tokens * ratio)
        results = group.of_seeds(name)
        if longer is not None and results:
            own = statistics.fmean(result.loss for result in results)
            said.append(
                f"- {ARMS[name].label} reaches {_loss(own)}; {ARMS[baseline].label} with {ratio:.2f} times as many "
                f"bytes, which takes the same CPU time, {_loss(longer)}: {own - longer:+.3f}."
            )
    return said


def _rate(run: Run) -> str:
    factor = "" if run.depth_lr_factor == 1 else f", depth x {run.depth_lr_factor:g}"
    return f"{run.learning_rate:g}{factor}"


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "diverged"


def _interval(found: Difference | None) -> str:
    if found is None:
        return "-"
    if found.num_seeds == 1:
        return f"{found.paired.difference:+.3f} (one seed)"
    return f"{found.paired.difference:+.3f} ± {found.half_width:.3f}"
