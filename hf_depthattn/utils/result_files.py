"""Files of results: complete when they have their name, valid JSON for every reader, and never over a foreign file."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete, and on the disk, when it has its name.

    Args:
        path: the file; one that is there is replaced.
        text: its content.

    Raises:
        OSError: no room, no permission; the message names the file, and nothing has its name that had it not before.
    """
    _write(path, text, "w", encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
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
        # Errors of writing do not name the file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync_folder(folder: Path) -> None:
    """The names in a folder survive a power cut; not possible on every system."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> Any:
    """The value as JSON knows it: NaN and infinities become None, and its texts can be encoded."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {encodable(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return encodable(value)


def encodable(value: Any) -> Any:
    """The value with the replacement character in place of lone surrogates, which no file can hold."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(encodable(item) for item in value)
    return value


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON that every reader takes, with a line feed at its end."""
    return json.dumps(to_json(value), indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def read_object(path: Path, advice: str = "choose another place (--out)") -> dict[str, Any]:
    """A JSON object from a file of results.

    Args:
        path: the file.
        advice: what to do when it holds something else.

    Raises:
        UserError: it does.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON; {advice}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a file of this command; {advice}.")
    return content
