"""Tables of the study in Markdown, and sentences that say what they show."""

from __future__ import annotations

import statistics
from dataclasses import replace

from .arms import ARMS, SCALED
from .cells import Lines, interval_cell, loss_cell, rate_cell, table_lines
from .comparison import Difference, difference, losses
from .group import Group

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
    rows = []
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
            is_compared = ARMS[name].is_like_scaled and name != SCALED
            cells.append(interval_cell(group.at_equal_tokens(name, SCALED)) if is_compared else "")
        rows.append(cells)
    return table_lines(columns, rows)


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
                f"- **{ARMS[name].label}** against {ARMS[baseline].label}: {difference_sentence(tokens)}; "
                f"at equal CPU time {difference_sentence(time)}."
            )
    return said


def difference_sentence(found: Difference | None) -> str:
    """Say in words what a difference shows.

    Args:
        found: the difference; `None` if a run diverged.
    """
    if found is None:
        return "no comparison, as a run diverged"
    size = f"{abs(found.paired.difference):.3f} nats per byte"
    if found.num_seeds == 1:
        return f"{size} {'lower' if found.paired.difference < 0 else 'higher'} on one seed, which decides nothing"
    if found.verdict == "undecided":
        return f"not decided ({interval_cell(found)} nats per byte)"
    return f"{found.verdict} by {size} ({interval_cell(found)})"


def rate_table(group: Group) -> Lines:
    """Return the table of the rates that were tried on seed 0.

    Args:
        group: the results.
    """
    rows = []
    for name in ARMS:
        tried = group.tried(name)
        if tried:
            best = min(tried, key=lambda result: result.loss)
            cells = [
                f"{rate_cell(r.run)}: {'**' if r is best else ''}{loss_cell(r.loss)}{'**' if r is best else ''}"
                for r in tried
            ]
            rows.append((ARMS[name].label, ", ".join(cells)))
    return table_lines(("arm", "held-out loss by peak rate, seed 0"), rows)


def unlucky_rates(group: Group) -> Lines:
    """Name the arms that are better with another rate if all seeds are counted, where these were trained.

    Args:
        group: the results.
    """
    said = []
    for name in group.arms(is_continued=False):
        best = group.of_seeds(name)
        mean = statistics.fmean(losses(best).values())
        for result in group.tried(name):
            other = losses(group.found(replace(result.run, seed=found.run.seed) for found in best))
            if len(other) == len(best) and statistics.fmean(other.values()) < mean:
                said.append(
                    f"- {ARMS[name].label}: {loss_cell(statistics.fmean(other.values()))} with "
                    f"{rate_cell(result.run)}, {loss_cell(mean)} with {rate_cell(best[0].run)}."
                )
    return said


def best_rates(group: Group) -> Lines:
    """Return the table of best rates, and of what the best rate of the reference costs the others.

    Args:
        group: the results.
    """
    reference = group.plan.best(group.reference)
    assert reference is not None, "a group has a reference"
    same = f"with the rate of {ARMS[group.reference].label} ({rate_cell(reference)})"
    rows = []
    for name in group.arms(is_continued=False):
        best = group.plan.best(name)
        assert best is not None, "it is among the arms with a best rate"
        same_rate = group.results.get(replace(best, learning_rate=reference.learning_rate))
        shown = "not tried" if same_rate is None else loss_cell(same_rate.loss)
        rows.append((ARMS[name].label, rate_cell(best), loss_cell(group.results[best].loss), shown))
    return table_lines(("arm", "best peak rate", "held-out loss", same), rows)


def depth_table(group: Group) -> Lines:
    """Return the table of other numbers of layers, or nothing if there are none.

    Args:
        group: the results.
    """
    depths = group.depths
    if len(depths) == 1:
        return []
    rows = []
    for name in group.arms(is_continued=False):
        baseline = group.better_baseline or group.baseline_of(name)
        cells = []
        for depth in depths:
            own = group.losses_at_depth(name, depth)
            of_baseline = {} if baseline is None else group.losses_at_depth(baseline, depth)
            shown = loss_cell(statistics.fmean(own.values())) if own else "-"
            if own and of_baseline and name != baseline:
                shown += f" ({interval_cell(difference(own, of_baseline))})"
            cells.append(shown)
        if cells.count("-") < len(depths) - 1:
            rows.append([ARMS[name].label, *cells])
    return table_lines(["arm", *(f"{depth} layers" for depth in depths)], rows)
