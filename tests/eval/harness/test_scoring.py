"""Our own tasks: CMath, GPQA, and generated code, which is not run without lm-eval's flag."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hf_depthattn.eval.harness.scoring import cmath_results, humaneval_results, mbpp_results
from hf_depthattn.eval.harness.task_files import tasks_folder


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


HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}


MBPP = {
    "task_id": 11,
    "text": "Write a function to add.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
}


class ConstantLM(LM):
    """Always gives the same text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests):
        return [self.text for _ in requests]


@pytest.fixture
def data(monkeypatch):
    """Two benchmarks of one item."""

    def load_dataset(path, name=None, **_):
        if path == "openai/openai_humaneval":
            return {"test": datasets.Dataset.from_list([HUMANEVAL])}
        prompt = [{**MBPP, "task_id": i} for i in range(1, 11)]
        return {"test": datasets.Dataset.from_list([MBPP]), "prompt": datasets.Dataset.from_list(prompt)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def manager() -> TaskManager:
    return TaskManager(include_path=str(tasks_folder()), include_defaults=False)


@pytest.mark.parametrize("task", ["humaneval_subprocess", "mbpp_subprocess"])
def test_nothing_runs_without_the_flag(data, tmp_path, task):
    trace = tmp_path / "trace"
    writer = ConstantLM(f"    open({str(trace)!r}, 'w')\n    return a + b\n")
    with pytest.raises(ValueError, match=f"{task} which is marked as unsafe"):
        simple_evaluate(model=writer, tasks=[task], task_manager=manager())
    assert not trace.exists()


@pytest.mark.parametrize(
    ("task", "completion", "expected"),
    [
        ("humaneval_subprocess", "    return a + b\n", 1.0),
        ("humaneval_subprocess", "    return a - b\n", 0.0),
        ("mbpp_subprocess", "def add(a, b):\n    return a + b\n", 1.0),
        ("mbpp_subprocess", "def add(a, b):\n    return 5\n", 0.0),
    ],
)
def test_with_the_flag_completions_are_scored(data, task, completion, expected):
    results = simple_evaluate(
        model=ConstantLM(completion), tasks=[task], task_manager=manager(), confirm_run_unsafe_code=True
    )
    assert results["results"][task]["pass_at_1,none"] == expected


def test_mbpp_shows_the_examples_of_its_paper(data):
    task = manager().load(["mbpp_subprocess"])["tasks"]["mbpp_subprocess"]
    assert [doc["task_id"] for doc in task.fewshot_docs()] == [2, 3, 4]


def test_scoring_functions():
    assert humaneval_results(HUMANEVAL, [HUMANEVAL["canonical_solution"]]) == {"pass_at_1": 1.0}
    assert humaneval_results(HUMANEVAL, [""]) == {"pass_at_1": 0.0}
    assert mbpp_results(MBPP, [MBPP["code"]]) == {"pass_at_1": 1.0}
    assert mbpp_results({**MBPP, "test_setup_code": "raise ValueError"}, [MBPP["code"]]) == {"pass_at_1": 0.0}


@pytest.mark.parametrize(
    ("golden", "answer", "expected"),
    [
        *(("8", "8.0", 1.0), ("1200", "1,200", 1.0), ("0.25", "25%", 1.0), ("0.5", "1/2", 1.0)),
        *(("8", "9", 0.0), ("8", "[invalid]", 0.0), ("8", "1/0", 0.0)),
    ],
)
def test_cmath_compares_numbers(golden, answer, expected):
    assert cmath_results({"golden": golden}, [answer]) == {"exact_match": expected}


def test_cmath_takes_the_last_number(monkeypatch):
    items = [{"question": "3加5是多少？", "golden": "8", "grade": 1, "reasoning_step": 1, "num_digits": 1}]
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"test": datasets.Dataset.from_list(items)})
    answer = ConstantLM("3加5等于8，3+5=8。答案是8")
    results = simple_evaluate(model=answer, tasks=["cmath"], task_manager=manager(), log_samples=True)
    assert results["results"]["cmath"]["exact_match,last-number"] == 1.0
    prompt = results["samples"]["cmath"][0]["arguments"][0][0]
    assert prompt.endswith("问题：3加5是多少？\n解答：") and prompt.count("答案是") == 3
