"""Chain-of-thought prompts and few-shot examples, read from the installed lm-eval.

YAML files refer to the functions of this module with `!function`: `gsm8k_cot`, and `bbh_<subtask>` for every task of
BIG-Bench Hard, created on access.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    # PyYAML without libyaml.
    from yaml import SafeLoader

from ...errors import UserError


def gsm8k_cot() -> list[dict[str, Any]]:
    """Return the 8 examples of the task `gsm8k_cot`."""
    return _examples("gsm8k/gsm8k-cot.yaml")


def __getattr__(name: str) -> Callable[[], list[dict[str, Any]]]:
    prefix, _, subtask = name.partition("_")
    if prefix != "bbh":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_examples, f"bbh/cot_fewshot/{subtask}.yaml")


def installed_tasks() -> Path:
    """Return the folder of lm-eval's tasks without importing lm-eval.

    Raises:
        UserError: if lm-eval is not installed.
    """
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        raise UserError("lm_eval is not installed; pip install 'hf-depthattn[eval]'.")
    return Path(found.origin).parent / "tasks"


def read_installed(file: Path) -> dict[str, Any]:
    """Read a file of lm-eval's tasks that contains no `!function`, which the safe loader does not know."""
    fields: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=SafeLoader)
    return fields


def _examples(file: str) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = read_installed(installed_tasks() / file)["fewshot_config"]["samples"]
    return samples
