"""`--compare`: paired differences against direct computations, and what is refused."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.compare import compare_runs

TIME = "2026-01-01T00-00-00"


def sample(doc_id: int, filter_name: str = "none", **metrics) -> dict:
    hashes = {name: f"{name}-{doc_id}" for name in ("doc_hash", "prompt_hash", "target_hash")}
    return {"doc_id": doc_id, "filter": filter_name, "metrics": list(metrics), **metrics, **hashes}


def save_run(folder: Path, tasks: dict[str, list[dict]], time: str = TIME) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{time}.json").write_text("{}")
    for task, samples in tasks.items():
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"samples_{task}_{time}.jsonl").write_text(lines)
    return folder


def test_mean_and_standard_error_of_paired_items(tmp_path):
    a, b = [0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1]
    run_a = save_run(tmp_path / "a", {"piqa": [sample(i, acc=float(x)) for i, x in enumerate(a)]})
    run_b = save_run(tmp_path / "b", {"piqa": [sample(i, acc=float(x)) for i, x in reversed([*enumerate(b)])]})
    (row,) = compare_runs(run_a, run_b).rows
    differences = [y - x for x, y in zip(a, b, strict=True)]
    assert (row.task, row.metric, row.num_items) == ("piqa", "acc,none", 7)
    assert (row.value_a, row.value_b) == pytest.approx((3 / 7, 5 / 7))
    assert row.difference == pytest.approx(statistics.mean(differences))
    assert row.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(7))


def test_bits_per_byte_is_a_ratio_of_sums(tmp_path):
    def samples(nats, num_bytes):
        return [
            sample(i, word_perplexity=[-x, 5], byte_perplexity=[-x, n], bits_per_byte=[-x, n])
            for i, (x, n) in enumerate(zip(nats, num_bytes, strict=True))
        ]

    num_bytes, nats_a, nats_b = [10, 20, 30], [7.0, 9.0, 11.0], [6.0, 9.5, 10.0]
    run_a = save_run(tmp_path / "a", {"wikitext": samples(nats_a, num_bytes)})
    run_b = save_run(tmp_path / "b", {"wikitext": samples(nats_b, num_bytes)})
    (row,) = compare_runs(run_a, run_b).rows
    assert row.metric == "bits_per_byte,none"
    assert row.value_a == pytest.approx(27 / 60 / math.log(2))
    assert row.difference == pytest.approx(-1.5 / 60 / math.log(2))
    ratio = -1.5 / 60
    residuals = [b - a - ratio * n for a, b, n in zip(nats_a, nats_b, num_bytes, strict=True)]
    assert row.standard_error == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 60 / math.log(2))


def test_perplexity_is_compared_by_its_logarithm(tmp_path):
    # lm-eval's samples hold log-likelihoods under this name.
    runs = [
        save_run(tmp_path / name, {"lambada": [sample(i, perplexity=x) for i, x in enumerate(values)]})
        for name, values in (("a", [-3.0, -5.0]), ("b", [-2.0, -5.0]))
    ]
    comparison = compare_runs(*runs)
    (row,) = comparison.rows
    assert (row.value_a, row.value_b, row.difference, row.standard_error) == (4.0, 3.5, -0.5, 0.5)
    assert "perplexity: its logarithm, in nats" in str(comparison)


def test_metrics_without_a_value_for_each_item_are_left_out(tmp_path):
    # As lm-eval writes Matthews correlation and F1: the pairs that the whole is made of.
    items = [sample(i, acc=float(i), mcc=[i, 1]) for i in (0, 1)]
    run = save_run(tmp_path / "a", {"cola": items})
    comparison = compare_runs(run, run)
    assert [row.metric for row in comparison.rows] == ["acc,none"]
    assert comparison.no_means == ("cola mcc,none",)
    assert "Not compared, no means over items: cola mcc,none." in str(comparison)


def test_every_metric_and_filter_has_its_row(tmp_path):
    items = [sample(i, name, exact_match=x) for name, x in (("strict", 1.0), ("flexible", 0.0)) for i in (0, 1)]
    run_a = save_run(
        tmp_path / "a", {"gsm8k": items, "arc": [sample(0, acc=1.0, acc_norm=0.0)], "only_a": [sample(0, acc=1.0)]}
    )
    # lm-eval's own command puts a folder of the model's name in between.
    save_run(tmp_path / "b" / "model", {"gsm8k": items, "arc": [sample(0, acc=0.0, acc_norm=0.0)]})
    comparison = compare_runs(run_a, tmp_path / "b")
    rows = {(row.task, row.metric): row for row in comparison.rows}
    assert set(rows) == {
        ("gsm8k", "exact_match,strict"),
        ("gsm8k", "exact_match,flexible"),
        ("arc", "acc,none"),
        ("arc", "acc_norm,none"),
    }
    assert rows["arc", "acc,none"].difference == -1
    assert math.isnan(rows["arc", "acc,none"].standard_error)
    assert rows["gsm8k", "exact_match,strict"].standard_error == 0
    assert comparison.only_in_one == ("only_a",)
    text = str(comparison)
    assert "B - A" in text and "-1.0000" in text and "In one run only: only_a." in text
    json.loads(json.dumps(comparison.to_dict(), allow_nan=False))


def test_groups_are_pooled_over_the_items_of_their_tasks(tmp_path):
    values = {"a": ([0, 1, 1], [1, 1, 1]), "b": ([1], [0])}
    runs = []
    for which in (0, 1):
        tasks = {
            task: [sample(i, acc=float(x), acc_norm=1.0) for i, x in enumerate(pair[which])]
            for task, pair in values.items()
        }
        tasks["b"] = [sample(0, acc=tasks["b"][0]["acc"])]
        run = save_run(tmp_path / str(which), tasks)
        results = {"groups": {"mmlu": {}}, "group_subtasks": {"suite": ["mmlu"], "mmlu": ["stem", "b"], "stem": ["a"]}}
        (run / f"results_{TIME}.json").write_text(json.dumps(results))
        runs.append(run)
    comparison = compare_runs(*runs)
    # Only the metric that both tasks have, and only the group that lm-eval averages.
    (row,) = comparison.groups
    differences = [1, 0, 0, -1]
    assert (row.task, row.metric, row.num_items, row.difference) == ("mmlu", "acc,none", 4, 0)
    assert row.standard_error == pytest.approx(statistics.stdev(differences) / 2)
    assert "group of tasks" in str(comparison)


def test_newest_results_are_taken(tmp_path):
    run_a = save_run(tmp_path / "a", {"piqa": [sample(0, acc=0.0)]}, "2026-01-01T00-00-00")
    save_run(tmp_path / "a", {"piqa": [sample(0, acc=1.0)]}, "2026-02-01T00-00-00")
    (row,) = compare_runs(run_a, run_a).rows
    assert row.value_a == 1


def test_what_cannot_be_paired_is_refused(tmp_path):
    good = save_run(tmp_path / "good", {"piqa": [sample(0, acc=0.0), sample(1, acc=0.0)]})
    shorter = save_run(tmp_path / "shorter", {"piqa": [sample(0, acc=0.0)]})
    other = save_run(tmp_path / "other", {"piqa": [sample(0, acc=0.0), {**sample(1, acc=0.0), "prompt_hash": "x"}]})
    foreign = save_run(tmp_path / "foreign", {"copa": [sample(0, acc=0.0)]})
    bare = save_run(tmp_path / "bare", {})
    empty = tmp_path / "empty"
    empty.mkdir()
    for run, message in {
        shorter: r"piqa: .*good has 2 answers and .*shorter 1, for different items; .*--limit",
        other: r"piqa: item 1 differs between .* \(prompt_hash\)",
        foreign: "no task in common",
        bare: "contains no samples of results_.*--log_samples",
        empty: r"contains no results_\*.json",
        tmp_path / "nowhere": "nowhere: no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            compare_runs(good, run)
