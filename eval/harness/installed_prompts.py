"""Few-shot examples with reasoning, taken from the installed lm-eval instead of being copied.

YAML files name its functions by `!function`: `gsm8k_cot`, and `bbh_<subtask>` for every task of BIG-Bench Hard, which
is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import yaml


def gsm8k_cot() -> list[dict]:
    """The 8 examples of the task `gsm8k_cot`."""
    return _examples("gsm8k/gsm8k-cot.yaml")


def __getattr__(name: str) -> Callable[[], list[dict]]:
    prefix, _, subtask = name.partition("_")
    if prefix != "bbh":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_examples, f"bbh/cot_fewshot/{subtask}.yaml")


def _examples(file: str) -> list[dict]:
    # The files of these tasks hold no `!function`, so the safe loader reads them.
    tasks = Path(find_spec("lm_eval.tasks").origin).parent
    return yaml.safe_load((tasks / file).read_text(encoding="utf-8"))["fewshot_config"]["samples"]
