"""What the study shows, in sentences and in tables over its settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from .arms import ARMS, SCALED
from .cells import Lines, interval_cell, loss_cell, table_lines
from .comparison import Difference, difference, losses, losses_at
from .group import Group, in_bytes
from .tables import difference_sentence

#: Verdict -> words before the names of arms.
_VERDICTS = {"better": "better", "worse": "worse", "undecided": "not decided", "diverged": "a run diverged"}


def conclusions(found: Sequence[Group]) -> Lines:
    """Say how often every arm is better than scaled PreNorm, and whether retrofits are worth it.

    Args:
        found: the results; those without scaled PreNorm are left out.
    """
    groups = _with_scaled(found)
    lines = []
    for name in _compared(groups):
        of_arm = _with(name, groups)
        tokens = [group.at_equal_tokens(name, SCALED) for group in of_arm]
        time = [group.at_equal_time(name, SCALED) for group in of_arm]
        lines.append(
            f"- **{ARMS[name].label}** against {ARMS[SCALED].label}: at equal bytes {_counts(tokens)}; at equal CPU "
            f"time {_counts(time)}."
        )
    # The first group of a corpus and depth has most arms.
    first = {(group.corpus, group.num_layers): group for group in reversed(groups)}
    lines += [line for group in groups if first[group.corpus, group.num_layers] is group for line in _by_budget(group)]
    for group in groups:
        names = [name for name in _beside_scaled(group) if name not in _compared(groups)]
        if names:
            tokens_of = {name: group.at_equal_tokens(name, SCALED) for name in names}
            lines.append(f"- Others, in one setting ({group.title}), at equal bytes: {_by_verdict(tokens_of)}.")
    return [*lines, *(line for group in found for line in retrofit_sentences(group))]


def _by_budget(group: Group) -> Lines:
    """Give the differences of arms with three budgets or more, but for those to a baseline that alone was tuned."""
    said = []
    for name in _beside_scaled(group):
        found = {}
        for tokens in group.budgets(name):
            own, other = (group.losses_at_budget(arm, tokens) for arm in (name, SCALED))
            if own.keys() & other.keys() and not group.is_untuned(name, SCALED, tokens):
                found[tokens] = interval_cell(difference(own, other))
        if len(found) > 2:
            budgets = ", ".join(in_bytes(tokens).removesuffix(" bytes") for tokens in found)
            said.append(
                f"- **{ARMS[name].label}** by bytes ({group.corpus}, {group.num_layers} layers): "
                f"{', '.join(found.values())} with {budgets} bytes."
            )
    return said


def _compared(groups: Sequence[Group]) -> Lines:
    """Return the arms that are compared with scaled PreNorm in several settings."""
    return [name for name in ARMS if sum(name in _beside_scaled(group) for group in groups) > 1]


def _with_scaled(found: Sequence[Group]) -> list[Group]:
    return [group for group in found if group.better_baseline is not None]


def _with(name: str, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if name in group.arms(is_continued=False)]


def _beside_scaled(group: Group) -> Lines:
    return [name for name in group.arms(is_continued=False) if ARMS[name].is_like_scaled and name != SCALED]


def _counts(differences: Sequence[Difference | None]) -> str:
    """Say how many differences have each verdict, with the range of the decided ones."""
    parts: Lines = []
    for verdict in ("better", "worse", "undecided"):
        sizes = [abs(found.paired.difference) for found in differences if found and found.verdict == verdict]
        if sizes:
            span = dict.fromkeys((f"{min(sizes):.3f}", f"{max(sizes):.3f}"))
            by = "" if verdict == "undecided" else f" (by {' to '.join(span)} nats per byte)"
            parts.append(f"{_VERDICTS[verdict]} in {_of(sizes, differences, parts)}{by}")
    if None in differences:
        parts.append(f"diverged in {_of([found for found in differences if found is None], differences, parts)}")
    return ", ".join(parts)


def _of(some: Sequence[object], all_of_them: Sequence[object], said_before: Lines) -> str:
    if len(some) == len(all_of_them):
        return f"all {len(some)} settings"
    return f"{len(some)}" if said_before else f"{len(some)} of {len(all_of_them)} settings"


def _by_verdict(differences: dict[str, Difference | None], *, with_numbers: bool = False) -> str:
    by_verdict: dict[str, Lines] = {verdict: [] for verdict in _VERDICTS}
    for name, found in sorted(differences.items(), key=lambda item: item[1].paired.difference if item[1] else 0):
        label = ARMS[name].label
        shown = f"{label} ({interval_cell(found)})" if with_numbers and found is not None else label
        by_verdict["diverged" if found is None else found.verdict].append(shown)
    return "; ".join(f"{_VERDICTS[verdict]}: {', '.join(labels)}" for verdict, labels in by_verdict.items() if labels)


def retrofit_sentences(group: Group) -> Lines:
    """Say from how many bytes on a retrofitted model is better than its control.

    Args:
        group: the results.
    """
    said = []
    for name in group.arms(is_continued=True):
        control = group.baseline_of(name)
        if control is None:
            continue
        own, other = group.of_seeds(name), group.of_seeds(control)
        evaluated = [tokens for tokens, _, _ in own[0].heldout_curve[1:]]
        verdicts = [_verdict(difference(losses_at(own, tokens), losses_at(other, tokens))) for tokens in evaluated]
        num_better = next((i for i, verdict in enumerate(reversed(verdicts)) if verdict != "better"), len(verdicts))
        phrases = {0: "not better for certain", 1: "better only at the end"}
        start = phrases.get(num_better, f"better from {in_bytes(evaluated[-num_better])} on")
        said.append(
            f"- **{ARMS[name].label}** against {ARMS[control].label} ({group.title}): at equal bytes {start} "
            f"({interval_cell(group.at_equal_tokens(name, control))} at the end, {in_bytes(evaluated[-1])}); at equal "
            f"CPU time {difference_sentence(group.at_equal_time(name, control))}."
        )
    return said


def _verdict(found: Difference | None) -> str:
    return "diverged" if found is None else found.verdict


def summary(group: Group) -> Lines:
    """Say which arms, trained from scratch, are better, worse and not decided, at equal bytes and at equal CPU time.

    Arms that start with scaled outputs, or bound the stream themselves, are compared with scaled PreNorm where that
    was trained: gains over it are no effect of the initial weights. The others are compared with their own baselines.

    Args:
        group: the results.
    """
    lines = []
    better = group.better_baseline
    names = [name for name in group.arms(is_continued=False) if name not in (better, group.reference)]
    if better not in (None, group.reference):
        gain = difference_sentence(group.at_equal_tokens(SCALED, group.reference))
        labels = f"{ARMS[SCALED].label} against {ARMS[group.reference].label}"
        lines.append(f"- {labels}, an effect of the initial weights: {gain}.")
    beside = [] if better is None else [name for name in names if ARMS[name].is_like_scaled]
    conditions: dict[str, Callable[[str, str], Difference | None]] = {
        "equal bytes": group.at_equal_tokens,
        "equal CPU time": group.at_equal_time,
    }
    for condition, compare in conditions.items():
        if beside:
            found = {name: compare(name, SCALED) for name in beside}
            lines.append(f"- At {condition}, against {ARMS[SCALED].label}: {_by_verdict(found, with_numbers=True)}.")
        own = {name: baseline for name in names if name not in beside and (baseline := group.baseline_of(name))}
        if own:
            found = {name: compare(name, baseline) for name, baseline in own.items()}
            lines.append(f"- At {condition}, each against its baseline: {_by_verdict(found, with_numbers=True)}.")
    return lines


def equal_time_sentence(found: Sequence[Group]) -> Lines:
    """Say which arms are better than scaled PreNorm at equal CPU time in some setting, worse in all, or neither.

    Args:
        found: the results; those without scaled PreNorm are left out.
    """
    groups = _with_scaled(found)
    said: dict[str, Lines] = {"better in some settings": [], "worse in all": [], "neither": []}
    for name in _compared(groups):
        verdicts = [_verdict(group.at_equal_time(name, SCALED)) for group in _with(name, groups)]
        num_better = verdicts.count("better")
        if num_better:
            said["better in some settings"].append(f"{ARMS[name].label} ({num_better} of {len(verdicts)})")
        else:
            said["worse in all" if {*verdicts} == {"worse"} else "neither"].append(ARMS[name].label)
    parts = "; ".join(f"{verdict}: {', '.join(labels)}" for verdict, labels in said.items() if labels)
    return [f"- At equal CPU time, against {ARMS[SCALED].label}: {parts}."] if parts else []


def settings_table(found: Sequence[Group], *, equal_time: bool) -> Lines:
    """Return the table of differences to scaled PreNorm over corpora, budgets and depths, or nothing for one of them.

    Args:
        found: the results; those without scaled PreNorm are left out.
        equal_time: at equal CPU time instead of at equal bytes, with losses.
    """
    groups = _with_scaled(found)
    names = _compared(groups)
    if not names:
        return []
    rows = [
        [
            ARMS[name].label,
            f"{_with(name, groups)[0].cost_ratio(name, SCALED):.2f} x",
            *(_in_setting(group, name, equal_time=equal_time) for group in groups),
        ]
        for name in names
    ]
    if not equal_time:
        of_scaled = (statistics.fmean(losses(group.of_seeds(SCALED)).values()) for group in groups)
        rows.insert(0, [ARMS[SCALED].label, "1.00 x", *map(loss_cell, of_scaled)])
    return table_lines(["arm", "CPU time of a byte", *(group.label for group in groups)], rows)


def _in_setting(group: Group, name: str, *, equal_time: bool) -> str:
    if name not in group.arms(is_continued=False):
        return "-"
    return interval_cell((group.at_equal_time if equal_time else group.at_equal_tokens)(name, SCALED))
