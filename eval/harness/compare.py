"""Paired differences between two runs of tasks, item by item."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...utils.json_lines import json_lines
from ...utils.paths import read_text
from ...utils.result_files import read_object, to_json
from ...utils.text_table import table
from ..paired_difference import Paired, paired_difference
from ..perplexity_compare import PerplexityComparison, compare_perplexity, report_of

# Equivalent to bits_per_byte.
_REDUNDANT = ("word_perplexity", "byte_perplexity")


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Paired difference of one metric of one task.

    Attributes:
        task: name of the task or group.
        metric: metric and filter, e.g. `"acc,none"`.
        num_items: number of items that both runs answered.
        value_a: mean over the items of run A, as a fraction; bits per byte for such metrics; for `perplexity` its
            logarithm, the mean negative log-likelihood of an answer in nats.
        value_b: the same for run B.
        difference: B - A.
        standard_error: standard error of the difference; NaN for a single item.
    """

    task: str
    metric: str
    num_items: int
    value_a: float
    value_b: float
    difference: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Comparison of two runs of tasks.

    Attributes:
        run_a, run_b: folders of the runs.
        groups: every metric of groups with a mean in lm-eval, such as MMLU, over the items of all their tasks.
        rows: every metric of every common task that is a mean over items.
        only_in_one: tasks that only one of the runs has.
        no_means: metrics that have no value per item, such as F1 or Matthews correlation.
    """

    run_a: str
    run_b: str
    groups: tuple[PairedDifference, ...]
    rows: tuple[PairedDifference, ...]
    only_in_one: tuple[str, ...]
    no_means: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; NaN and infinities become None."""
        values: dict[str, Any] = to_json(asdict(self))
        return values

    def __str__(self) -> str:
        lines = [f"A: {self.run_a}", f"B: {self.run_b}", "", _text("task", self.rows)]
        if self.groups:
            lines += ["", _text("group of tasks", self.groups)]
        if any(row.metric.startswith("perplexity,") for row in self.rows):
            lines += ["", "perplexity: its logarithm, in nats per answer; lower is better."]
        if self.no_means:
            lines += ["", f"Not compared, no means over items: {', '.join(self.no_means)}."]
        if self.only_in_one:
            lines += ["", f"In one run only: {', '.join(self.only_in_one)}."]
        return "\n".join(lines)


def compare_results(run_a: Path, run_b: Path) -> RunComparison | PerplexityComparison:
    """Compare two runs of the same kind.

    Args:
        run_a: the baseline: a folder of results, or a result file of `--perplexity`.
        run_b: the other run.

    Raises:
        UserError: if a run is missing, the runs are of different kinds, or they scored different items.
    """
    for run in (run_a, run_b):
        if not run.exists():
            raise UserError(f"{run}: no such folder or file.")
    reports = report_of(run_a), report_of(run_b)
    if reports[0] is not None and reports[1] is not None:
        return compare_perplexity(reports[0], reports[1])
    if reports != (None, None):
        with_one, without = (run_a, run_b) if reports[0] is not None else (run_b, run_a)
        raise UserError(f"{with_one}: is a run of --perplexity, {without} is not; compare two runs of the same kind.")
    return compare_runs(run_a, run_b)


def compare_runs(run_a: Path, run_b: Path) -> RunComparison:
    """Compare two folders with results and samples, written by this package or by `lm-eval run --log_samples`.

    Args:
        run_a: folder of the baseline.
        run_b: folder of the other run.

    Raises:
        UserError: if results or samples are missing, the runs share no task, or the items of a task differ.
    """
    tasks_a, tasks_b = _samples(run_a), _samples(run_b)
    common = [task for task in tasks_a if task in tasks_b]
    if not common:
        raise UserError(f"{run_a}, {run_b}: no task in common.")
    pairs, no_means = {}, []
    for task in common:
        found = _pairs(task, tasks_a[task], tasks_b[task], run_a, run_b)
        pairs[task] = {metric: values for metric, values in found.items() if _is_mean(metric, *values)}
        no_means += [f"{task} {metric}" for metric in found if metric not in pairs[task]]
    rows = [_difference(task, metric, a, b) for task in common for metric, (a, b) in pairs[task].items()]
    groups = [
        _difference(group, metric, a, b)
        for group, members in _groups(_newest_results(run_a)).items()
        if all(member in pairs for member in members)
        for metric, (a, b) in _pooled([pairs[member] for member in members]).items()
    ]
    only_in_one = tuple(sorted(tasks_a.keys() ^ tasks_b.keys()))
    return RunComparison(str(run_a), str(run_b), tuple(groups), tuple(rows), only_in_one, tuple(no_means))


def leaves_of(group: str, results: dict[str, Any]) -> list[str]:
    """Return the tasks of a group and of its sub-groups in a results file; a task is returned itself."""
    members = results.get("group_subtasks", {}).get(group)
    return [leaf for member in members for leaf in leaves_of(member, results)] if members else [group]


def _groups(file: Path) -> dict[str, list[str]]:
    """Return the groups for which lm-eval reports a mean, with their tasks."""
    results = read_object(file)
    return {group: leaves_of(group, results) for group in results.get("groups", {})}


def _newest_results(run: Path) -> Path:
    newest = max(run.rglob("results_*.json"), key=lambda file: file.name, default=None)
    if newest is None:
        raise UserError(f"{run}: contains no results_*.json; the run is incomplete, or this is not its folder.")
    return newest


def _samples(run: Path) -> dict[str, Path]:
    """Return the file of samples of each task of the newest results in a folder."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder.")
    newest = _newest_results(run)
    time = newest.stem.removeprefix("results_")
    files = {
        file.stem.removeprefix("samples_").removesuffix(f"_{time}"): file
        for file in sorted(newest.parent.glob(f"samples_*_{time}.jsonl"))
    }
    if not files:
        raise UserError(f"{run}: contains no samples of {newest.name}; run lm-eval with --log_samples.")
    return files


def _pairs(task: str, file_a: Path, file_b: Path, run_a: Path, run_b: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    """Return, for each `metric,filter`, the values of A and of B for the same items in the same order."""
    items_a, items_b = _items(file_a), _items(file_b)
    if items_a.keys() != items_b.keys():
        raise UserError(
            f"{task}: {run_a} has {len(items_a)} answers and {run_b} {len(items_b)}, for different items; run both "
            "with the same --limit."
        )
    for (doc_id, filter_name), item in items_a.items():
        other = items_b[doc_id, filter_name]
        for what in ("doc_hash", "prompt_hash", "target_hash"):
            if item.get(what) != other.get(what):
                raise UserError(
                    f"{task}: item {doc_id} differs between {run_a} and {run_b} ({what}); use the same data, number "
                    "of shots and version of lm-eval."
                )
    pairs: dict[str, tuple[list[Any], list[Any]]] = {}
    for key, item in items_a.items():
        for metric in item["metrics"]:
            if metric not in _REDUNDANT:
                a, b = pairs.setdefault(f"{metric},{item['filter']}", ([], []))
                a.append(item[metric])
                b.append(items_b[key][metric])
    return pairs


def _is_mean(metric: str, a: list[Any], b: list[Any]) -> bool:
    return metric.startswith("bits_per_byte,") or all(
        value is None or isinstance(value, int | float) for value in (*a, *b)
    )


def _pooled(members: list[dict[str, tuple[list[Any], list[Any]]]]) -> dict[str, tuple[list[Any], list[Any]]]:
    """Pool the items of several tasks, for the metrics that all of them have."""
    metrics = [metric for metric in members[0] if all(metric in member for member in members)]
    return {
        metric: (
            [value for member in members for value in member[metric][0]],
            [value for member in members for value in member[metric][1]],
        )
        for metric in metrics
    }


def _difference(task: str, metric: str, a: list[Any], b: list[Any]) -> PairedDifference:
    return PairedDifference(task, metric, len(a), *_paired(metric.partition(",")[0], a, b))


def _text(what: str, rows: tuple[PairedDifference, ...]) -> str:
    cells = [[what, "metric", "n", "A", "B", "B - A", "± stderr"]]
    for row in rows:
        numbers = [f"{x:.4f}" for x in (row.value_a, row.value_b)]
        change = [f"{row.difference:+.4f}", f"{row.standard_error:.4f}"]
        cells.append([row.task, row.metric, str(row.num_items), *numbers, *change])
    return table(cells)


def _items(file: Path) -> dict[tuple[int, str], dict[str, Any]]:
    text = read_text(file)
    try:
        return {(item["doc_id"], item["filter"]): item for _, item in json_lines(file, text)}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not a file of samples, or is truncated; run the task again.") from error


def _paired(metric: str, a: list[Any], b: list[Any]) -> Paired:
    weights = None
    if metric == "bits_per_byte":
        weights = [float(item[1]) for item in a]
        a, b = ([_number(item[0]) / -math.log(2) for item in items] for items in (a, b))
    if metric == "perplexity":
        # lm-eval stores the log-likelihood of each answer.
        a, b = ([-_number(x) for x in items] for items in (a, b))
    return paired_difference([_number(x) for x in a], [_number(x) for x in b], weights)


def _number(value: float | None) -> float:
    """Return NaN for None: files of this package store NaN as null."""
    return math.nan if value is None else float(value)
