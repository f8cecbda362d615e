"""Suppress the log messages, warnings and progress bars of other libraries in the output of a command."""

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
# Loggers with warnings at import: of torchao about its kernels, of torch about torchao.
_LOGGERS = ("torchao", "torch.utils._pytree")


@contextmanager
def quiet_libraries(progress: bool | None) -> Iterator[None]:
    """Let transformers log only errors and show its progress bars where ours are shown; show only our own warnings.

    Nothing is imported, so that a command that fails before it needs transformers fails without delay.

    Args:
        progress: whether progress is shown, as in `progress_bar`.
    """
    show_bars = progress is not False and sys.stderr.isatty()
    with warnings.catch_warnings():
        # With -W or PYTHONWARNINGS, the user's filters apply.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="hf_depthattn")
            # FutureWarnings of libraries have the location of their caller, which may be our code.
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
    # Not imported, since `--help` and errors in arguments need no transformers, whose import takes seconds.
    return sys.modules.get("transformers.utils.logging")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables within the context, except those that the user has set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
