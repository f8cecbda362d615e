"""The groups of tasks: how many leaves they have, what their tables name, and what the local tasks ask.

Nothing is downloaded: lm-eval's task class, which loads its data when it is made, is replaced by a stub.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks._factory as factory
import yaml
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness import task_files
from hf_depthattn.eval.harness.suites import SUITES, TASKS_FOLDER, load_suite
from hf_depthattn.eval.harness.task_files import generated_files, tasks_folder
from hf_depthattn.eval.harness.tasks import load_tasks

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


# --- with lm-eval's own tasks ---


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


# --- without them ---


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


def test_every_subject_has_a_file():
    files = generated_files()
    assert len(files) == 57 + 57 + 27
    assert files["local/mmlu/anatomy.yaml"].startswith("include: ../_mmlu_template_yaml\ntask: mmlu_anatomy_local\n")
    config = yaml.safe_load(files["local/mmlu/anatomy.yaml"])
    assert config["description"] == "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert not {name for name in files if (TASKS_FOLDER / name).exists()}


def test_every_yaml_file_is_found():
    # lm-eval skips a file with a mistake without a message.
    index = TaskManager(include_path=str(tasks_folder()), include_defaults=False).task_index
    found = {entry.yaml_path.resolve() for entry in index.values() if entry.yaml_path}
    assert found == {path.resolve() for path in tasks_folder().rglob("*.yaml")}
    assert len(found) > 57 + 57 + 27


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_depthattn" / "tasks"


def test_the_folder_of_tasks_is_written_once_and_completed(cache):
    folder = tasks_folder()
    assert folder.parent == cache and list(cache.iterdir()) == [folder]
    written = {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in folder.rglob("*.yaml")}
    assert tasks_folder() == folder
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    (folder / "local" / "mmlu" / "anatomy.yaml").unlink()
    assert tasks_folder() == folder and (folder / "local" / "mmlu" / "anatomy.yaml").is_file()
    assert list(cache.iterdir()) == [folder]


def test_other_task_files_are_another_folder(cache, monkeypatch):
    before = tasks_folder()
    monkeypatch.setattr(task_files, "generated_files", lambda: {"local/mmlu/anatomy.yaml": "task: other_local\n"})
    assert (
        tasks_folder() != before and (tasks_folder() / "local/mmlu/anatomy.yaml").read_text() == "task: other_local\n"
    )
    assert (before / "local" / "mmlu" / "virology.yaml").is_file()


def test_a_second_process_that_was_faster_is_no_error(cache, monkeypatch):
    folder = tasks_folder()
    (folder / "local" / "mmlu" / "anatomy.yaml").unlink()
    monkeypatch.setattr(task_files.shutil, "rmtree", lambda *a, **k: None)
    assert tasks_folder() == folder and list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.*: Not a directory; name a folder in XDG_CACHE_HOME"):
        tasks_folder()


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


def test_unknown_suite_and_task_are_refused():
    with pytest.raises(UserError, match="--suite glue: must be one of attnres, moda, ppl, small"):
        load_suite("glue", local=False)
    with pytest.raises(UserError, match="--tasks nothing_local: unknown"):
        load_tasks(None, ["nothing_local"])


def test_missing_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHATTN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: is not a folder.*DEPTHATTN_DATA"):
        load_tasks(None, ["copa_local"])
    monkeypatch.setenv("DEPTHATTN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"tasks/copa.jsonl: missing; DEPTHATTN_DATA must name"):
        load_tasks(None, ["copa_local"])


# --- prompts of the local tasks: lm-eval's own, character by character ---


def first_prompt(name: str, **overrides) -> tuple[str, list[str]]:
    task = load_tasks(None, [name]).load([name])["tasks"][name]
    for key, value in overrides.items():
        task.set_config(key=key, value=value)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=1)
    arguments = [instance.args for instance in task.instances]
    return arguments[0][0], [a[1] for a in arguments]


@pytest.mark.parametrize(
    ("task", "prompt", "answers"),
    [
        (
            "piqa_local",
            "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:",
            [" Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips", None],
        ),
        ("copa_local", "The man turned on the faucet therefore", ["  the toilet filled", "  water flowed"]),
        (
            "winogrande_local",
            "Sarah was a much better surgeon than Maria so Sarah",
            [" always got the easier cases.", " always got the easier cases."],
        ),
        ("boolq_local", "All biomass goes through", [" no", " yes"]),
        ("openbookqa_local", "A person wants to start saving money", [" make", " quit", " buy", " have"]),
        ("arc_easy_local", "Question: Which statement best explains why photosynthesis", [" S", " M", " C", " T"]),
        ("mmlu_abstract_algebra_continuation_local", "The following are questions (with answers) about", None),
        ("lambada_openai_local", "In my palm is a clear stone", [" signs"]),
    ],
)
def test_local_prompt(depthattn_data, task, prompt, answers):
    context, continuations = first_prompt(task)
    assert context.startswith(prompt)
    for continuation, answer in zip(continuations, answers or [], strict=False):
        assert answer is None or continuation.startswith(answer)
    if task in ("piqa_local", "boolq_local", "arc_easy_local"):
        assert context.endswith("\nAnswer:") and "Passage:" not in context


def test_few_shot_prompts_of_local_tasks(depthattn_data):
    mmlu, answers = first_prompt("mmlu_abstract_algebra_local", num_fewshot=5)
    assert mmlu.count("\nAnswer:") == 6 and answers == [" A", " B", " C", " D"]
    gsm8k, _ = first_prompt("gsm8k_cot_local")
    assert gsm8k.startswith("Q: There are 15 trees in the grove.") and gsm8k.count("The answer is") == 8
    assert gsm8k.endswith("farmers' market?\nA:")
    bbh, _ = first_prompt("bbh_cot_fewshot_boolean_expressions_local")
    assert bbh.count("So the answer is") == 3 and bbh.endswith("A: Let's think step by step.\n")
    trivia, _ = first_prompt("triviaqa_local", num_fewshot=5)
    assert trivia.count("Question:") == 6 and trivia.endswith("which vegetable??\nAnswer:")


@pytest.mark.parametrize("name", ["triviaqa_local", "arc_easy_local"])
def test_no_item_is_its_own_example(depthattn_data, name):
    task = load_tasks(None, [name]).load([name])["tasks"][name]
    items = task.dataset["test"].select(range(3))
    task.dataset["test"] = items
    task.sampler.replace_df(list(items))
    # Two shots out of three items: without a rule against it, most prompts would hold their own answer.
    task.set_config(key="num_fewshot", value=2)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    prompts = {instance.doc_id: instance.args[0] for instance in task.instances}
    assert len(prompts) == 3
    for doc_id, prompt in prompts.items():
        assert prompt.count(task.doc_to_text(items[doc_id])) == 1 and prompt.count("\nAnswer:") == 3


def test_no_item_of_gpqa_is_its_own_example(monkeypatch):
    # lm-eval's own task shuffles the choices of an item and of the same item among the examples differently.
    choices = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [{"Question": f"Number {i}?", **{name: f"{name} {i}" for name in choices}} for i in range(9)]
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"train": datasets.Dataset.from_list(rows)})
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False)
    task = manager.load(["gpqa_diamond_distinct"])["tasks"]["gpqa_diamond_distinct"]
    task.set_config(key="num_fewshot", value=5)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    prompts = {instance.doc_id: instance.args[0] for instance in task.instances}
    assert len(prompts) == 9
    for doc_id, prompt in prompts.items():
        assert prompt.count("Question:") == 6 and prompt.count(f"Number {doc_id}?") == 1
    targets = {task.doc_to_target(doc) for doc in task.eval_docs}
    assert len(targets) > 1, "the choices are not shuffled"


def test_local_files_are_whole(depthattn_data):
    manager = load_tasks(load_suite("moda", local=True), [])
    sizes = {name: len(task.dataset["test"]) for name, task in manager.load([])["tasks"].items()}
    mmlu = sum(size for name, size in sizes.items() if name.startswith("mmlu"))
    # The known sizes of the test sets (PIQA, WinoGrande and BoolQ: validation).
    assert mmlu == 14042
    assert [sizes[f"{name}_local"] for name in ("piqa", "winogrande", "openbookqa", "boolq", "arc_easy", "copa")] == [
        1838,
        1267,
        500,
        3270,
        2376,
        100,
    ]


def test_templates_have_no_task_of_their_own():
    for path in TASKS_FOLDER.rglob("_*_yaml"):
        text = "\n".join(line for line in path.read_text().splitlines() if "!function" not in line)
        assert "task" not in yaml.safe_load(text)
