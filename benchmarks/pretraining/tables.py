"""Tables of the study in Markdown, and sentences that say what they show."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from .arms import ARMS, SCALED
from .cells import Lines, interval_cell, loss_cell, rate_cell
from .comparison import Difference, difference, losses
from .group import Group
from .runs import Run

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
    has_scaled = not is_continued and group.better_baseline not in (None, group.reference)
    columns = (*_ARM_COLUMNS, _SCALED_COLUMN) if has_scaled else _ARM_COLUMNS
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in group.arms(is_continued=is_continued):
        arm, results = ARMS[name], group.of_seeds(name)
        loss = statistics.fmean(result.loss for result in results)
        cells = [
            arm.label,
            f"{results[0].parameters:,}",
            rate_cell(results[0].run),
            loss_cell(loss),
            str(len(results)),
        ]
        baseline = group.baseline_of(name)
        if baseline is None:
            cells += ["", "", "1.00", ""]
        else:
            cells += [
                ARMS[baseline].label,
                interval_cell(group.at_equal_tokens(name, baseline)),
                f"{group.cost_ratio(name, baseline):.2f}",
                interval_cell(group.at_equal_time(name, baseline)),
            ]
        if has_scaled:
            cells.append(interval_cell(group.at_equal_tokens(name, SCALED)) if name != SCALED else "")
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
        baseline = group.baseline_of(name)
        if baseline is not None:
            tokens, time = group.at_equal_tokens(name, baseline), group.at_equal_time(name, baseline)
            said.append(
                f"- **{ARMS[name].label}** against {ARMS[baseline].label}: {_sentence(tokens)}; "
                f"at equal CPU time {_sentence(time)}."
            )
    return said


def _sentence(found: Difference | None) -> str:
    if found is None:
        return "no comparison, as a run diverged"
    size = f"{abs(found.paired.difference):.3f} nats per byte"
    if found.num_seeds == 1:
        return f"{size} {'lower' if found.paired.difference < 0 else 'higher'} on one seed, which decides nothing"
    if found.verdict == "undecided":
        return f"not decided ({interval_cell(found)} nats per byte)"
    return f"{found.verdict} by {size} ({interval_cell(found)})"


def summary(group: Group) -> Lines:
    """Say which arms, trained from scratch, are better, worse and not decided, at equal tokens and at equal CPU time.

    All are compared with scaled PreNorm where that was trained, since gains over it are no effect of the initial
    weights, else with their own baselines.

    Args:
        group: the results.
    """
    better = group.better_baseline
    against = "each against its baseline" if better is None else f"against {ARMS[better].label}"
    baselines = {name: better or group.baseline_of(name) for name in group.arms(is_continued=False) if name != better}
    lines = []
    if better is not None and better != group.reference:
        labels = f"{ARMS[better].label} against {ARMS[group.reference].label}"
        gain = _sentence(group.at_equal_tokens(better, group.reference))
        lines.append(f"- {labels}, an effect of the initial weights: {gain}.")
    for condition, compare in (("equal tokens", group.at_equal_tokens), ("equal CPU time", group.at_equal_time)):
        by_verdict: dict[str, Lines] = {verdict: [] for verdict in _VERDICTS}
        differences = {name: compare(name, other) for name, other in baselines.items() if other is not None}
        for name, found in sorted(differences.items(), key=lambda item: item[1].paired.difference if item[1] else 0):
            by_verdict["diverged" if found is None else found.verdict].append(
                ARMS[name].label if found is None else f"{ARMS[name].label} ({interval_cell(found)})"
            )
        said = [f"{_VERDICTS[verdict]}: {', '.join(labels)}" for verdict, labels in by_verdict.items() if labels]
        if said:
            lines.append(f"- At {condition}, {against}: {'; '.join(said)}.")
    return lines


#: Verdict -> words before the names of arms.
_VERDICTS = {
    "better": "better",
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
                f"{rate_cell(r.run)}: {'**' if r is best else ''}{loss_cell(r.loss)}{'**' if r is best else ''}"
                for r in tried
            ]
            lines.append(f"| {ARMS[name].label} | {', '.join(cells)} |")
    return lines


def best_rates(group: Group) -> Lines:
    """Return the table of best rates, and of what the best rate of the reference costs the others.

    Args:
        group: the results.
    """
    reference = group.plan.best(group.reference)
    assert reference is not None, "a group has a reference"
    same = f"with the rate of {ARMS[group.reference].label} ({rate_cell(reference)})"
    lines = [
        f"| arm | best peak rate | held-out loss | {same} |",
        "|---|---|---|---|",
    ]
    for name in group.arms(is_continued=False):
        best = group.plan.best(name)
        assert best is not None, "it is among the arms with a best rate"
        same_rate = group.results.get(replace(best, learning_rate=reference.learning_rate))
        shown = "not tried" if same_rate is None else loss_cell(same_rate.loss)
        lines.append(f"| {ARMS[name].label} | {rate_cell(best)} | {loss_cell(group.results[best].loss)} | {shown} |")
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
        baseline = group.better_baseline or group.baseline_of(name)
        cells = []
        for depth in depths:
            own = losses(group.found(group.plan.at_depth(name, depth)))
            of_baseline = losses(group.found(group.plan.at_depth(baseline, depth))) if baseline is not None else {}
            shown = loss_cell(statistics.fmean(own.values())) if own else "-"
            if own and of_baseline and name != baseline:
                shown += f" ({interval_cell(difference(own, of_baseline))})"
            cells.append(shown)
        if cells.count("-") < len(depths) - 1:
            lines.append(f"| {ARMS[name].label} | {' | '.join(cells)} |")
    return lines


def settings_table(found: Sequence[Group], *, equal_time: bool) -> Lines:
    """Return the table of differences to scaled PreNorm over corpora, budgets and depths, or nothing for one of them.

    Args:
        found: the results; those without scaled PreNorm are left out.
        equal_time: at equal CPU time, with the ratios of CPU time, instead of at equal tokens, with losses.
    """
    found = [group for group in found if group.better_baseline is not None]
    names = [name for name in ARMS if sum(name in group.arms(is_continued=False) for group in found) > 1]
    if len(found) < 2:
        return []
    lines = [f"| arm | {' | '.join(group.label for group in found)} |", "|---" * (1 + len(found)) + "|"]
    for name in names:
        if not (equal_time and name == SCALED):
            cells = [_in_setting(group, name, equal_time=equal_time) for group in found]
            lines.append(f"| {ARMS[name].label} | {' | '.join(cells)} |")
    return lines


def _in_setting(group: Group, name: str, *, equal_time: bool) -> str:
    if name not in group.arms(is_continued=False):
        return "-"
    if name == SCALED:
        return loss_cell(statistics.fmean(result.loss for result in group.of_seeds(name)))
    if equal_time:
        return f"{interval_cell(group.at_equal_time(name, SCALED))} ({group.cost_ratio(name, SCALED):.2f} x)"
    return interval_cell(group.at_equal_tokens(name, SCALED))


def _is_other_depth(run: Run, group: Group) -> bool:
    return (run.corpus, run.tokens) == (group.corpus, group.tokens) and run.num_layers != group.num_layers
