"""Keeps libraries from talking between the lines of a command."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Read by transformers and huggingface_hub when they are imported.
_VERBOSITY, _NO_BARS = "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"


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
            logging = _transformers_logging()
            before = None if logging is None else (logging.get_verbosity(), logging.is_progress_bar_enabled())
            if logging is not None:
                logging.set_verbosity_error()
                if not show_bars:
                    logging.disable_progress_bar()
            try:
                yield
            finally:
                logging = _transformers_logging()
                if logging is not None:
                    verbosity, has_bars = before or (logging.WARNING, True)
                    logging.set_verbosity(verbosity)
                    if has_bars:
                        logging.enable_progress_bar()


def _transformers_logging():
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
