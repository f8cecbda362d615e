"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from .text_table import size

#: Seconds between two lines if stderr is not a terminal (log files, batch systems).
SECONDS_BETWEEN_LINES = 5.0


def progress_bar(
    steps: Iterable[Any] | int | None,
    description: str,
    shown: bool | None = None,
    *,
    total: int | None = None,
    unit: str = "it",
) -> Any:
    """Show progress on stderr.

    Args:
        steps: the iterable, or the number of steps if `update` is called.
        description: a word or two about the task.
        shown: `False` shows nothing. `True` and `None` show a bar on a terminal, and a line every few seconds
            elsewhere; with `True` there is always a line at the end.
        total: number of steps, for an iterable without length.
        unit: the unit of a step; `"B"` for bytes.

    Returns:
        An iterable that is also a context manager with a method `update(n)`.
    """
    iterable = None if steps is None or isinstance(steps, int) else steps
    if total is None:
        total = steps if isinstance(steps, int) else getattr(steps, "__len__", lambda: None)()
    if shown is not False and sys.stderr.isatty():
        from tqdm.auto import tqdm

        return tqdm(iterable, desc=description, total=total, unit=unit, unit_scale=unit == "B")
    return ProgressLines(iterable, description, total=total, unit=unit, shown=shown)


class ProgressLines:
    """Lines such as `weights: 3.1 GB of 12.4 GB (25 %), 20 s, about 60 s left`, at most one every few seconds.

    Args:
        iterable: the iterable, if any.
        description: a word or two about the task.
        total: number of steps, if known.
        unit: the unit of a step; `"B"` for bytes.
        shown: as in `progress_bar`.
    """

    def __init__(
        self, iterable: Iterable[Any] | None, description: str, *, total: int | None, unit: str, shown: bool | None
    ):
        self._iterable = iterable
        self._description = description
        self._total = total
        self._unit = unit
        self._shown = shown
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._last_text = ""

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None, "there is no iterable"
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, error_type: type | None, error: object, traceback: object) -> None:
        # After an error, the error message is the last line.
        if error_type is None:
            self.close()

    def update(self, n: int = 1) -> None:
        """Advance by n steps."""
        self._done += n
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        """Print the last line, if `shown` is true or a line was printed before."""
        if self._shown or self._last_text:
            self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        text = self._text()
        if self._shown is not False and text != self._last_text:
            print(text, file=sys.stderr, flush=True)
            self._last_text = text

    def _text(self) -> str:
        seconds = time.monotonic() - self._started
        if not self._total:
            return f"{self._description}: {self._amount(self._done)}, {seconds:.0f} s"
        done = f"{self._amount(self._done)} of {self._amount(self._total)} ({100 * self._done / self._total:.0f} %)"
        text = f"{self._description}: {done}, {seconds:.0f} s"
        if 0 < self._done < self._total:
            text += f", about {seconds * (self._total - self._done) / self._done:.0f} s left"
        return text

    def _amount(self, number: int) -> str:
        return size(number) if self._unit == "B" else f"{number:,}"
