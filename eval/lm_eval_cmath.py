"""Scoring of CMath: numbers are compared as numbers."""

from __future__ import annotations

from fractions import Fraction


def results(doc: dict, answers: list[str]) -> dict[str, float]:
    """1.0 if the extracted answer is the item's number."""
    expected, given = _number(str(doc["golden"])), _number(answers[0])
    return {"exact_match": float(given is not None and given == expected)}


def _number(text: str) -> Fraction | None:
    """`"1,200"`, `"8.0"`, `"3/4"` or `"25%"` as a fraction, None for anything else."""
    text = text.strip().replace(",", "")
    percent = text.endswith("%")
    try:
        value = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value
