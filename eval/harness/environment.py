"""What lm-eval and the libraries below it read from the environment, set before they are imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ...errors import UserError


def need_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed; pip install 'hf-depthattn[eval]'.")


def prepare_environment() -> None:
    """Settings that lm-eval reads when it is imported: above all, its request cache lies outside site-packages."""
    os.environ.setdefault("LM_HARNESS_CACHE_PATH", str(cache_folder() / "lm_eval"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def cache_folder() -> Path:
    """Where this package keeps what can be made again: `$XDG_CACHE_HOME/hf_depthattn`, `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_depthattn"
