"""The one reader of JSON Lines: a JSON value per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError


def json_lines(path: Path, text: str, problem: str = "is not JSON") -> Iterator[tuple[str, Any]]:
    """Yield the place of each value, for messages, and the value; empty lines are skipped.

    Args:
        path: the file.
        text: its content, from `utils.paths.read_text`.
        problem: what the message says of a line that is not JSON.

    Raises:
        UserError: if a line is not JSON.
    """
    # Not `splitlines`, which also splits at characters such as U+2028 that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} {problem}.") from error
            yield where, value
