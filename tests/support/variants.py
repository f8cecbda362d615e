"""Tests over hosts, or connections, times variants: the quick tests run each of them once, the slow ones the rest."""

from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest


def in_turn(rows: Iterable[str], variants: Sequence[Any], *, every: Container[str] = ()) -> list:
    """Return parameters (row, variant) of a test: a row has one variant in turn, and the others are slow.

    Args:
        rows: values of the first parameter, such as model types.
        variants: values of the second parameter, or tuples of those of further ones, all of which suit every row.
        every: rows whose variants are all quick.
    """
    params = []
    for number, row in enumerate(rows):
        for index, variant in enumerate(variants):
            values = variant if isinstance(variant, tuple) else (variant,)
            is_quick = row in every or index == number % len(variants)
            name = "-".join([row, *(getattr(value, "__name__", str(value)) for value in values)])
            params.append(pytest.param(row, *values, id=name, marks=() if is_quick else pytest.mark.slow))
    return params
