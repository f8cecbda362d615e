"""The suites: how many leaves their groups have, and what their tables name.

Nothing is downloaded: lm-eval's task class, which loads its data when it is made, is replaced by a stub.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks._factory as factory
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.suites import SUITES, TASKS_FOLDER, load_suite
from hf_depthattn.eval.harness.task_files import tasks_folder

#: group -> distinct leaves. AttnRes: MMLU 57, MMLU-Pro 14, GPQA 1, BBH 27, ARC-Challenge, HellaSwag, TriviaQA and
#: GSM8K 4, MGSM 11, Math 7, CMath 1, HumanEval and MBPP 2, CMMLU 67, C-Eval 52. MoDA: 9 and MMLU's 57.
LEAVES = {
    "depthattn_attnres": 243,
    "depthattn_moda": 66,
    "depthattn_ppl": 5,
    "depthattn_small": 5,
    "depthattn_attnres_local": 57 + 27 + 2,
    "depthattn_moda_local": 6 + 57,
    "depthattn_ppl_local": 2,
    "depthattn_small_local": 4,
}


NUM_BENCHMARKS = {"attnres": 15, "moda": 10, "small": 5}


#: Folders of lm-eval that hold the members; reading all of it takes ten seconds.
MEMBERS = (
    *("arc", "bbh", "benchmarks", "ceval", "cmmlu", "gsm8k", "hellaswag", "lambada", "mgsm", "minerva_math"),
    *("mmlu", "mmlu_pro", "openbookqa", "paloma", "pile_10k", "piqa", "sciq", "super_glue", "triviaqa", "wikitext"),
    "winogrande",
)


class StubTask(Task):
    """Keeps its config and loads nothing."""

    def __init__(self, config):
        self._config = config

    @property
    def config(self):
        return self._config

    @property
    def task_name(self):
        return self._config["task"]

    def _unused(self, *_):
        raise NotImplementedError

    has_training_docs = has_validation_docs = has_test_docs = doc_to_text = doc_to_target = _unused
    construct_requests = process_results = aggregation = higher_is_better = _unused


@pytest.fixture(scope="module")
def manager():
    """With the files of lm-eval that the groups name."""
    installed = Path(find_spec("lm_eval.tasks").origin).parent
    folders = [installed / name for name in MEMBERS]
    return TaskManager(include_path=[*folders, tasks_folder()], include_defaults=False)


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(factory, "ConfigurableTask", StubTask)
    # Functions stay names: those of lm-eval's HumanEval ask the Hub when they are imported.
    monkeypatch.setattr(factory, "load_yaml", lambda path, resolve_func: load_yaml(path, resolve_func=False))


def leaves(manager, spec) -> dict[str, StubTask]:
    return manager.load([spec])["tasks"]


def test_groups_have_all_leaves(manager, stubbed):
    assert {group: len(leaves(manager, group)) for group in LEAVES} == LEAVES


@pytest.mark.slow
def test_groups_have_all_leaves_among_all_of_lm_evals_tasks(stubbed):
    manager = TaskManager(include_path=str(tasks_folder()))
    assert {group: len(leaves(manager, group)) for group in LEAVES} == LEAVES


def test_overrides_reach_every_leaf(manager, stubbed):
    tasks = leaves(manager, "depthattn_attnres")
    shots = {name: task.config.get("num_fewshot") for name, task in tasks.items()}
    assert {shots[name] for name in shots if name.startswith(("mmlu_", "cmmlu_", "ceval"))} == {5}
    assert {shots[name] for name in shots if name.startswith("mgsm_native_cot_")} == {8}
    assert (shots["arc_challenge"], shots["hellaswag"], shots["gsm8k_cot"]) == (25, 10, 8)
    assert {task.config.get("num_fewshot") for task in leaves(manager, "depthattn_moda").values()} == {0}


def test_naming_a_group_as_a_task_would_collapse_it(manager, stubbed):
    # The trap that the counts guard against; when lm-eval mends it, this test says so.
    entry = manager.task_index["depthattn_moda"]
    broken = {"group": "broken", "task": [{"task": "mmlu", "num_fewshot": 5}]}
    manager.task_index["broken"] = type(entry)(name="broken", kind=entry.kind, yaml_path=None, cfg=broken)
    assert len(leaves(manager, "broken")) < 57


def test_every_benchmark_names_a_result_with_its_metric(manager, stubbed):
    for name in SUITES:
        for local in (False, True):
            suite = load_suite(name, local=local)
            loaded = manager.load([suite.group])
            for row in suite.benchmarks:
                metric, _, metric_filter = row.metric.partition(",")
                if row.task in loaded["groups"]:
                    # A group shows what it aggregates, by the filters of its leaves unless it names some.
                    aggregated = loaded["groups"][row.task].aggregate_metric_list
                    (filters,) = {str(a.filter_list) for a in aggregated if a.metric == metric}
                    leaf = loaded["groups"][row.task].get_all_tasks()[0].config
                    names = {f["name"] for f in leaf.get("filter_list") or [{"name": "none"}]}
                    assert metric_filter in names, row
                    assert metric_filter in filters or filters == "None", (row, filters)
                    continue
                config = loaded["tasks"][row.task].config
                assert metric in {str(m["metric"]) for m in config["metric_list"]}, row
                assert metric_filter in {f["name"] for f in config.get("filter_list") or [{"name": "none"}]}, row


def test_suites_state_every_benchmark_and_every_gap():
    published = json.loads((TASKS_FOLDER.parent / "harness" / "published_results.json").read_text())
    for name in SUITES:
        whole, local = load_suite(name, local=False), load_suite(name, local=True)
        assert len(whole.benchmarks) == NUM_BENCHMARKS.get(name, len(whole.benchmarks))
        assert all(row.source for row in (*whole.benchmarks, *local.benchmarks))
        if name == "ppl":
            continue
        names = {row.benchmark for row in whole.benchmarks}
        assert names == {row.benchmark for row in local.benchmarks} | set(local.missing)
        for pair in published.get(name, {"pairs": []})["pairs"]:
            assert pair["values"].keys() == names
    # Perplexity: the ten sets of the paper are a task of ours or are named as missing.
    ppl = load_suite("ppl", local=False)
    rows = {row.benchmark for row in ppl.benchmarks} | set(ppl.missing)
    assert set(published["ppl"]["pairs"][0]["values"]) <= rows


def test_published_averages_are_those_of_the_papers():
    # arXiv 2603.15619 prints the means of its tables, which shows that no cell was mistyped.
    published = json.loads((TASKS_FOLDER.parent / "harness" / "published_results.json").read_text())
    means = {"moda": [(57.11, 58.87), (62.28, 64.39)], "ppl": [(15.61, 15.46), (13.67, 13.47)]}
    for name, expected in means.items():
        for pair, mean in zip(published[name]["pairs"], expected, strict=True):
            for which in (0, 1):
                values = [cell[which] for cell in pair["values"].values()]
                assert sum(values) / len(values) == pytest.approx(mean[which], abs=0.0101)


def test_exclude_leaves_benchmarks_out():
    suite = load_suite("attnres", local=False).without(["HumanEval", "mbpp_subprocess", "MGSM"])
    assert len(suite.benchmarks) == len(suite.members) == 12
    assert not {"humaneval_subprocess", "mbpp_subprocess"} & {str(member) for member in suite.members}
    with pytest.raises(UserError, match="--exclude XYZ: not one of MMLU, "):
        suite.without(["XYZ"])
    with pytest.raises(UserError, match="leaves nothing"):
        load_suite("moda", local=True).without(
            ["PIQA", "WinoGrande", "OpenBookQA", "BoolQ", "ARC-Easy", "COPA", "MMLU"]
        )


def test_an_unknown_suite_is_refused():
    with pytest.raises(UserError, match="--suite glue: must be one of attnres, moda, ppl, small"):
        load_suite("glue", local=False)
