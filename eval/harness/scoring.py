"""What our own tasks (`tasks/cmath`, `tasks/gpqa`, `tasks/code`) do with items and answers.

HumanEval and MBPP are scored without `evaluate`, whose `code_eval` wants the network when a task is only listed.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .code_runner import passes

if TYPE_CHECKING:
    from datasets import Dataset

#: The examples in MBPP's own prompt, by `task_id` (arXiv 2108.07732); lm-eval has the same three.
_MBPP_EXAMPLES = (2, 3, 4)


def cmath_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 if the extracted answer is the item's number; numbers are compared as numbers."""
    expected, given = _number(str(doc["golden"])), _number(answers[0])
    return {"exact_match": float(given is not None and given == expected)}


def _number(text: str) -> Fraction | None:
    """`"1,200"`, `"8.0"`, `"3/4"` or `"25%"` as a fraction, None for anything else."""
    text = text.strip().replace(",", "")
    percent = text.endswith("%")
    try:
        value = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def gpqa_items(dataset: Dataset) -> Dataset:
    """lm-eval's items of GPQA; every call shuffles their choices alike.

    So lm-eval can tell an item among its own examples.
    """
    from lm_eval.tasks.gpqa.n_shot import utils

    # lm-eval goes on with one generator, so that items and examples differ.
    utils.rng = random.Random(42)
    return utils.process_docs(dataset)


def humaneval_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 if the prompt, the completion and the tests run to their end."""
    source = f"{doc['prompt']}{answers[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(passes(source))}


def mbpp_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 if the completion passes all of the item's assertions."""
    source = "\n".join([doc.get("test_setup_code") or "", answers[0], *doc["test_list"], ""])
    return {"pass_at_1": float(passes(source))}


def mbpp_examples(dataset: Dataset) -> Dataset:
    """The items of the split `prompt` that are shown."""
    return dataset.filter(lambda doc: doc["task_id"] in _MBPP_EXAMPLES)
