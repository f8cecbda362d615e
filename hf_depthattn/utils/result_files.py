"""Result files: written atomically, as strictly valid JSON, and never over a file of another program."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and flush it to disk.

    Args:
        path: the file; an existing file is replaced.
        text: its content.

    Raises:
        OSError: if writing fails (disk full, no permission); the message names the file, which is unchanged.
    """
    _write(path, text, "w", encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a binary file atomically and flush it to disk, as in `write_text`."""
    _write(path, content, "wb")


def _write(path: Path, content: str | bytes, mode: str, **options: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open(mode, **options) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # Errors of `write` do not contain the file name.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the system supports it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> Any:
    """Return a value that is valid in JSON: NaN and infinities become `None`, and strings can be encoded."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {encodable(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return encodable(value)


def encodable(value: Any) -> Any:
    """Return the value with lone surrogates, which cannot be encoded, replaced by the replacement character."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(encodable(item) for item in value)
    return value


def json_text(value: Any, indent: int | None = 2) -> str:
    """Return strictly valid JSON with a final newline."""
    return json.dumps(to_json(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def read_object(path: Path, advice: str = "choose another place (--out)") -> dict[str, Any]:
    """Read the JSON object in a result file.

    Args:
        path: the file.
        advice: end of the error message, what the user can do.

    Raises:
        UserError: if the file contains something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON; {advice}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a file of this command; {advice}.")
    return content
