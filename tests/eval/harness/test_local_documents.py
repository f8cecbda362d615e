"""The local tasks ask what lm-eval's own ask, character by character."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.local_documents import bbh, jsonl, mmlu, wikitext2
from hf_depthattn.eval.harness.suites import load_suite
from hf_depthattn.eval.harness.tasks import load_tasks


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


@pytest.mark.parametrize(
    ("load", "file", "content", "message"),
    [
        (lambda: jsonl(file="items.jsonl"), "items.jsonl", b'{"a": 1}\n{"a', "items.jsonl: line 2 is not JSON"),
        (lambda: jsonl(file="items.jsonl"), "items.jsonl", b"\xff", "items.jsonl: not UTF-8 text"),
        (lambda: bbh(subtask="x"), "tasks/bbh/x.json", b'{"examples": [{}]}', "x.json: is damaged; download"),
        (lambda: bbh(subtask="x"), "tasks/bbh/x.json", b"{", "x.json: is not JSON; download"),
        (lambda: mmlu(subject="x"), "tasks/mmlu/dev/x_dev.csv", b"question\nwhy\n", "x_dev.csv: is damaged; download"),
        (wikitext2, "wikitext2/test.txt", b"\xff", "test.txt: not UTF-8 text"),
    ],
    ids=["cut", "binary", "no field", "no JSON", "no column", "binary text"],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, monkeypatch, load, file, content, message):
    monkeypatch.setenv("DEPTHATTN_DATA", str(tmp_path))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load()
