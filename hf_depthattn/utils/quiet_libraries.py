"""Keeps libraries from talking between the lines of a command."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read by transformers and huggingface_hub when they are imported.
_VERBOSITY, _NO_BARS = "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"
# Loggers that complain while libraries are imported: of torchao about its kernels, of torch about torchao.
_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries(progress: bool | None) -> Iterator[None]:
    """transformers reports errors only, its bars appear where ours do, and warnings are shown for our code only.

    Nothing is imported for that: a command that fails before it needs transformers does not wait for it.

    Args:
        progress: as in `progress_bar`.
    """
    show_bars = progress is not False and sys.stderr.isatty()
    with warnings.catch_warnings():
        # Whoever asks for warnings (-W, PYTHONWARNINGS) gets all of them.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="hf_depthattn")
            # Libraries give them the place of their caller.
            warnings.simplefilter("ignore", FutureWarning)
        with _environment({_VERBOSITY: "error"} | ({} if show_bars else {_NO_BARS: "1"})):
            hf_logging = _transformers_logging()
            before = None if hf_logging is None else (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
            if hf_logging is not None:
                hf_logging.set_verbosity_error()
                if not show_bars:
                    hf_logging.disable_progress_bar()
            levels = {name: logging.getLogger(name).level for name in _LOGGERS}
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            try:
                yield
            finally:
                for name, level in levels.items():
                    logging.getLogger(name).setLevel(level)
                hf_logging = _transformers_logging()
                if hf_logging is not None:
                    verbosity, has_bars = before or (hf_logging.WARNING, True)
                    hf_logging.set_verbosity(verbosity)
                    if has_bars:
                        hf_logging.enable_progress_bar()


def _transformers_logging() -> Any:
    return sys.modules.get("transformers.utils.logging")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the time being; those that the user has set stay."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
