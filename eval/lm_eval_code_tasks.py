"""Scoring of HumanEval and MBPP without `evaluate`, whose `code_eval` wants the network when a task is only listed."""

from __future__ import annotations

from datasets import Dataset

from .code_runner import passes

#: The examples in MBPP's own prompt, by `task_id` (arXiv 2108.07732); lm-eval has the same three.
_MBPP_EXAMPLES = (2, 3, 4)


def humaneval_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the prompt, the completion and the tests run to their end."""
    source = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(passes(source))}


def mbpp_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the completion passes all of the item's assertions."""
    source = "\n".join([doc.get("test_setup_code") or "", results[0], *doc["test_list"], ""])
    return {"pass_at_1": float(passes(source))}


def mbpp_examples(dataset: Dataset) -> Dataset:
    """The items of the split `prompt` that are shown."""
    return dataset.filter(lambda doc: doc["task_id"] in _MBPP_EXAMPLES)
