"""Markdown table of a suite's results next to the published numbers of its paper."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...utils.result_files import read_object
from .compare import leaves_of
from .suites import Benchmark, Suite

_PUBLISHED = Path(__file__).with_name("published_results.json")
#: Metrics that are fractions of the items, printed in percent as in the papers.
SHARES = ("acc", "acc_norm", "exact_match", "pass_at_1", "math_verify")


def suite_table(suite: Suite, results: dict[str, Any]) -> str:
    """Return the Markdown table of a suite.

    Args:
        suite: the suite that was run.
        results: content of lm-eval's results file.
    """
    published = read_object(_PUBLISHED, advice="install the package again").get(suite.name)
    pairs = published["pairs"] if published else []
    columns = ["benchmark", "lm-eval task", "metric", "shots", "n", "ours", "± stderr"]
    columns += [pair[which] for pair in pairs for which in ("baseline", "with")]
    rows = [columns]
    rows += [_row(row, results, pairs) for row in suite.benchmarks if row.task in _values(results)]
    rows += [[name, "none", "", "", "", "", "", *_published_cells(name, pairs)] for name in suite.missing]
    lines = [f"# {results['model_name']}: {suite.group}", "", *_markdown(rows), "", *_notes(suite, results, published)]
    return "\n".join(lines) + "\n"


def tasks_table(results: dict[str, Any]) -> str:
    """Return a Markdown table with every metric of a run of single tasks."""
    rows = [["task", "metric", "shots", "n", "value", "± stderr"]]
    for task, values in _values(results).items():
        for key in values:
            if "," in key and "_stderr," not in key:
                benchmark = Benchmark(task, task, key, "")
                _, _, metric, shots, n, value, stderr = _row(benchmark, results, [])
                rows.append([task, metric, shots, n, value, stderr])
    return "\n".join([f"# {results['model_name']}", "", *_markdown(rows), "", *_notes(None, results, None)]) + "\n"


def _values(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {**results["results"], **results.get("groups", {})}


def _row(row: Benchmark, results: dict[str, Any], pairs: list[dict[str, Any]]) -> list[str]:
    values = _values(results)[row.task]
    value = values.get(row.metric)
    stderr = values.get(row.metric.replace(",", "_stderr,", 1))
    metric, _, metric_filter = row.metric.partition(",")
    leaves = leaves_of(row.task, results)
    shots = sorted({str(results["n-shot"][leaf]) for leaf in leaves if leaf in results["n-shot"]})
    n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves if leaf in results["n-samples"])
    return [
        row.benchmark,
        row.task,
        metric if metric_filter == "none" else f"{metric} ({metric_filter})",
        "/".join(shots),
        str(n),
        _number(metric, value),
        _number(metric, stderr),
        *_published_cells(row.benchmark, pairs),
    ]


def _number(metric: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{100 * value:.2f}" if metric in SHARES else f"{value:.4f}"


def _published_cells(benchmark: str, pairs: list[dict[str, Any]]) -> list[str]:
    # Print as many decimals as the paper; JSON does not keep trailing zeros (35.60).
    numbers = [value for pair in pairs for values in pair["values"].values() for value in values]
    decimals = max((len(str(value).partition(".")[2]) for value in numbers), default=0)
    cells = [pair["values"].get(benchmark) for pair in pairs]
    return [text for cell in cells for text in ([f"{x:.{decimals}f}" for x in cell] if cell else ["-", "-"])]


def _markdown(rows: list[list[str]]) -> list[str]:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _notes(suite: Suite | None, results: dict[str, Any], published: dict[str, Any] | None) -> Iterator[str]:
    config = results["config"]
    if config.get("limit") is not None:
        yield f"- **Only the first {config['limit']:g} items of each task**: a test of the pipeline, not a result."
    yield "- Accuracies are in percent; ± is lm-eval's standard error over the items."
    if published:
        yield (
            f"- Published numbers: {published['source']} ({published['unit']}), for other models and data. The paper "
            "does not state the number of shots or the prompts; ours, and their sources:"
        )
    if suite:
        for row in suite.benchmarks:
            if row.task in _values(results):
                yield f"  - {row.benchmark}: {row.source}"
        for name, reason in suite.missing.items():
            yield f"  - {name}, not run: {reason}"
    # Few-shot examples and prompts depend on these versions.
    yield f"- Task versions: {_task_versions(suite, results)}."
    yield (
        f"- lm_eval {results['lm_eval_version']}, transformers {results['transformers_version']}, "
        f"torch {_torch_version()}, hf-depthattn {_own_version()}, Python {platform.python_version()}; "
        f"dtype {config.get('model_dtype')}, max_length {results.get('max_length')}, "
        f"batch size {config.get('batch_size')}, seeds {config.get('random_seed')}, {config.get('numpy_seed')}, "
        f"{config.get('torch_seed')}, {config.get('fewshot_seed')}."
    )


def _task_versions(suite: Suite | None, results: dict[str, Any]) -> str:
    names = [row.task for row in suite.benchmarks] if suite else list(results["versions"])
    return ", ".join(f"{name} {results['versions'][name]}" for name in names if name in results["versions"])


def _torch_version() -> str:
    import torch

    return torch.__version__


def _own_version() -> str:
    import hf_depthattn

    return hf_depthattn.__version__
