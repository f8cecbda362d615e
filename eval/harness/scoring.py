"""Item processing and scoring of the tasks in `tasks/cmath`, `tasks/gpqa` and `tasks/code`.

HumanEval and MBPP do not use `code_eval` of the package `evaluate`, which needs the network even to list a task.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .code_runner import passes

if TYPE_CHECKING:
    from datasets import Dataset

#: `task_id` of the three examples in MBPP's prompt (arXiv 2108.07732), also used by lm-eval.
_MBPP_EXAMPLES = (2, 3, 4)


def cmath_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Return accuracy 1.0 if the extracted answer equals the item's number, compared numerically."""
    expected, given = _number(str(doc["golden"])), _number(answers[0])
    return {"exact_match": float(given is not None and given == expected)}


def _number(text: str) -> Fraction | None:
    """Parse `"1,200"`, `"8.0"`, `"3/4"` or `"25%"` as a fraction; return None for anything else."""
    text = text.strip().replace(",", "")
    percent = text.endswith("%")
    try:
        value = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def gpqa_items(dataset: Dataset) -> Dataset:
    """Return lm-eval's items of GPQA, with the choices shuffled identically on every call.

    This lets lm-eval recognise an item among its few-shot examples.
    """
    from lm_eval.tasks.gpqa.n_shot import utils

    # lm-eval keeps using one generator, so that items and few-shot examples would differ.
    utils.rng = random.Random(42)
    return utils.process_docs(dataset)


def humaneval_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Return pass@1 1.0 if prompt, completion and tests run without an error."""
    source = f"{doc['prompt']}{answers[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(passes(source))}


def mbpp_results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Return pass@1 1.0 if the completion passes all assertions of the item."""
    source = "\n".join([doc.get("test_setup_code") or "", answers[0], *doc["test_list"], ""])
    return {"pass_at_1": float(passes(source))}


def mbpp_examples(dataset: Dataset) -> Dataset:
    """Select the few-shot examples from the split `prompt`."""
    return dataset.filter(lambda doc: doc["task_id"] in _MBPP_EXAMPLES)
