"""One-line messages for user errors."""

from __future__ import annotations

import json
import re

from ..errors import UserError

# Errors of libraries that are user errors (a bad file, field or network connection) -> start of the message. They are
# given by package and class name, so that no library has to be imported.
_LIBRARY_ERRORS = {
    ("safetensors", "SafetensorError"): "a weight file cannot be read: ",
    ("huggingface_hub", "StrictDataclassError"): "",
    ("huggingface_hub", "HFValidationError"): "",
    ("httpx", "HTTPError"): "the Hub cannot be reached: ",
    ("httpx2", "HTTPError"): "the Hub cannot be reached: ",
    ("torch", "OutOfMemoryError"): "too large for the memory here: ",
}
# The folder of a repository in the cache; its id is in it.
_SNAPSHOT = re.compile(r"[^\s'\"]*/models--([\w.-]+)/snapshots/[0-9a-f]{40}")
# Messages of torch's RuntimeErrors about memory; other RuntimeErrors are bugs.
_TOO_LARGE = (
    "out of memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
    "Invalid buffer size",
    "numel: integer multiplication overflow",
)


def one_line(error: BaseException) -> str:
    """Return the message of the innermost cause of an error, on one line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return printable(str(cause)) or type(cause).__name__


def printable(text: str) -> str:
    """Return a text on one line, with unprintable characters, which could control a terminal, escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def _with_hub_ids(text: str) -> str:
    """Return a text with Hub ids in place of the folders that they have in the cache of huggingface_hub."""
    return _SNAPSHOT.sub(lambda found: found[1].replace("--", "/"), text)


def user_error(error: BaseException) -> str | None:
    """Return the message for a user error, on one line, or `None` for a bug.

    Args:
        error: the error that a command raised.
    """
    if isinstance(error, UserError):
        return _with_hub_ids(printable(str(error))) or "an argument is invalid"
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        place = f"{error.filename}: " if error.filename else ""
        return printable(f"{place}{error.strerror or error}") or type(error).__name__
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read (JSON in JSON, thousands of levels)"
    if isinstance(error, MemoryError):
        return "out of memory" + (f": {printable(str(error))}" if str(error) else "")
    if isinstance(error, json.JSONDecodeError | UnicodeError):
        return f"a file cannot be read: {one_line(error)}"
    if isinstance(error, OSError):
        # Errors of huggingface_hub, requests and transformers are OSErrors too.
        return one_line(error)
    for cls in type(error).__mro__:
        prefix = _LIBRARY_ERRORS.get((cls.__module__.partition(".")[0], cls.__name__))
        if prefix is not None:
            return prefix + one_line(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_LARGE):
        return f"too large for the memory here: {one_line(error)}"
    return None
