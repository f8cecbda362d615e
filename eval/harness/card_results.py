"""Results of lm-eval in the form of model cards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from .compare import leaves_of
from .suites import LOCAL_SUFFIX
from .table import SHARES

#: Task -> data set that the Hub knows as a benchmark, name of the task there, and the metric.
_BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match,flexible-extract"),
    "gsm8k_cot": ("openai/gsm8k", "gsm8k", "exact_match,flexible-extract"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match,custom-extract"),
    "gpqa_diamond_distinct": ("Idavidrein/gpqa", "gpqa_diamond", "acc,none"),
}
_SOURCE = ("lm-eval", "https://github.com/EleutherAI/lm-evaluation-harness")


def card_results(results: dict[str, Any]) -> list[EvalResult]:
    """Return the results of a run for the metadata of a card; of groups with a mean, only the mean.

    Args:
        results: content of lm-eval's results file.
    """
    found = []
    for task, values in _values(results).items():
        leaf = leaves_of(task, results)[0]
        config = results["configs"].get(leaf, {})
        data_set = config.get("dataset_path")
        is_on_hub = isinstance(data_set, str) and "/" in data_set and not leaf.endswith(LOCAL_SUFFIX)
        name = data_set if is_on_hub else task
        for key, value in values.items():
            metric, comma, name_of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # huggingface_hub writes one entry per data set, so that only the metric can tell tasks and shots apart.
            shown = metric if name_of_filter == "none" else f"{metric} ({name_of_filter})"
            unit = ", percent" if metric in SHARES else ""
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=name,
                    dataset_name=name,
                    dataset_config=config.get("dataset_name") if is_on_hub and leaf == task else None,
                    dataset_split=config.get("test_split") or config.get("validation_split"),
                    metric_type=metric,
                    metric_name=f"{task}: {shown}{unit}, {_shots(task, results)} shots",
                    metric_value=_value(metric, value),
                    source_name=_SOURCE[0],
                    source_url=_SOURCE[1],
                )
            )
    return found


def benchmark_results(results: dict[str, Any]) -> dict[str, EvalResultEntry]:
    """Return the results of a run on benchmarks of the Hub, by the name of the task.

    Args:
        results: content of lm-eval's results file.
    """
    found = {}
    values = _values(results)
    for task, (data_set, task_id, metric) in _BENCHMARKS.items():
        value = values.get(task, {}).get(metric)
        if isinstance(value, int | float):
            found[task] = EvalResultEntry(
                dataset_id=data_set,
                task_id=task_id,
                value=_value(metric.partition(",")[0], value),
                date=datetime.fromtimestamp(results["date"], UTC).date().isoformat(),
                notes=f"lm-eval {results['lm_eval_version']}, task {task}, {_shots(task, results)} shots, {metric}",
            )
    return found


def _values(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of groups with a mean and of tasks outside them."""
    groups = results.get("groups", {})
    members = {name for group in groups for name in results.get("group_subtasks", {}).get(group, ())}
    members |= {leaf for group in groups for leaf in leaves_of(group, results)}
    return {task: values for task, values in {**results["results"], **groups}.items() if task not in members}


def _shots(task: str, results: dict[str, Any]) -> int:
    return max((results["n-shot"].get(leaf, 0) for leaf in leaves_of(task, results)), default=0)


def _value(metric: str, value: float) -> float:
    return round(100 * value if metric in SHARES else value, 4)
