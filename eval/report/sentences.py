"""Parts of the findings and of the summary: numbers as words, and where they are largest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .result import StoredResult


def known(values: Iterable[float | None]) -> list[float]:
    """The values without None."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the known values."""
    numbers = known(values)
    return sum(numbers) / len(numbers) if numbers else None


def argmax(values: list[float | None]) -> int | None:
    """Where the largest known value is."""
    numbered = [(index, value) for index, value in enumerate(values) if value is not None]
    return max(numbered, key=lambda pair: pair[1])[0] if numbered else None


def argmin(values: list[float | None]) -> int | None:
    """Where the smallest known value is."""
    numbered = [(index, value) for index, value in enumerate(values) if value is not None]
    return min(numbered, key=lambda pair: pair[1])[0] if numbered else None


def no_number(name: str) -> str:
    """The finding where a number does not exist."""
    return f"{name}: no number here: the model gives NaN or infinite values."


def number(value: float | None) -> str:
    """Three digits."""
    return "unknown" if value is None else f"{value:.3g}"


def signed(value: float | None) -> str:
    """Three digits and the sign."""
    return "an unknown number of" if value is None else f"{value:+.3g}"


def percent(value: float | None) -> str:
    """A share."""
    return "unknown" if value is None else f"{value:.1%}"


def field_text(name: str) -> Callable[[StoredResult], str | None]:
    """For a summary line: one field of the result."""
    return lambda result: None if result[name] is None else f"{result[name]:.3f}"


def mean_text(name: str) -> Callable[[StoredResult], str | None]:
    """For a summary line: the mean of a list of the result."""

    def text_of(result: StoredResult) -> str | None:
        value = mean(result[name])
        return None if value is None else f"{value:.3f}"

    return text_of


def field_values(name: str) -> Callable[[StoredResult], list[float | None]]:
    """For a layer line: a list of the result."""
    return lambda result: result[name]
