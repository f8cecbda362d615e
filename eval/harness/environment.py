"""Environment variables that must be set before lm-eval and its libraries are imported."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ...errors import UserError


def need_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        UserError: if it is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm_eval is not installed; pip install 'hf-depthattn[eval]'.")


def prepare_environment() -> None:
    """Set variables that lm-eval reads on import; above all, move its request cache out of site-packages."""
    os.environ.setdefault("LM_HARNESS_CACHE_PATH", str(cache_folder() / "lm_eval"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def cache_folder() -> Path:
    """Return the cache folder of this package: `$XDG_CACHE_HOME/hf_depthattn`, in `~/.cache` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_depthattn"
