"""Helpers for findings and summary: format numbers, and find the largest and smallest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .result import StoredResult


def known(values: Iterable[float | None]) -> list[float]:
    """Return the values without None."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None."""
    numbers = known(values)
    return sum(numbers) / len(numbers) if numbers else None


def argmax(values: list[float | None]) -> int | None:
    """Return the index of the largest value."""
    numbered = [(index, value) for index, value in enumerate(values) if value is not None]
    return max(numbered, key=lambda pair: pair[1])[0] if numbered else None


def argmin(values: list[float | None]) -> int | None:
    """Return the index of the smallest value."""
    numbered = [(index, value) for index, value in enumerate(values) if value is not None]
    return min(numbered, key=lambda pair: pair[1])[0] if numbered else None


def no_number(name: str) -> str:
    """Return the finding for a model without this number."""
    return f"{name}: no result, because the model produces NaN or infinite values."


def number(value: float | None) -> str:
    """Format with three significant digits."""
    return "unknown" if value is None else f"{value:.3g}"


def signed(value: float | None) -> str:
    """Format with three significant digits and the sign."""
    return "an unknown number of" if value is None else f"{value:+.3g}"


def percent(value: float | None) -> str:
    """Format as a percentage."""
    return "unknown" if value is None else f"{value:.1%}"


def field_text(name: str) -> Callable[[StoredResult], str | None]:
    """Return a function for a summary line that formats one field of the result."""
    return lambda result: None if result[name] is None else f"{result[name]:.3f}"


def mean_text(name: str) -> Callable[[StoredResult], str | None]:
    """Return a function for a summary line that formats the mean of a list in the result."""

    def text_of(result: StoredResult) -> str | None:
        value = mean(result[name])
        return None if value is None else f"{value:.3f}"

    return text_of


def field_values(name: str) -> Callable[[StoredResult], list[float | None]]:
    """Return a function for a layer line that selects a list in the result."""
    return lambda result: result[name]
