"""Differences of two models on the same items, with a standard error.

Two checkpoints answer the same items, so the difference of each item is known and its spread is far smaller than that
of the two scores. With differences d_i of n items, the mean is compared with its standard error

    se = sqrt(sum (d_i - mean)^2 / (n - 1)) / sqrt(n).

Bits per byte and nats per token are ratios of sums; their standard error is the linearised one of a ratio estimator,
with the bytes or tokens w_i of each text in the place of the count:

    D = sum d_i / sum w_i,    se = sqrt(n / (n - 1) * sum (d_i - D w_i)^2) / sum w_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Values of A and B, B minus A, and its standard error: NaN for a single item, or where an item has no value."""

    value_a: float
    value_b: float
    difference: float
    standard_error: float


def paired_difference(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> Paired:
    """The difference of two means, or of two ratios of sums.

    Args:
        a: values of the items of A.
        b: values of the same items of B.
        weights: what the sums are divided by, by item; 1 each by default.
    """
    weights = [1.0] * len(a) if weights is None else weights
    total = sum(weights)
    difference = sum(y - x for x, y in zip(a, b, strict=True)) / total
    n = len(a)
    squares = sum((y - x - difference * w) ** 2 for x, y, w in zip(a, b, weights, strict=True))
    standard_error = math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan
    return Paired(sum(a) / total, sum(b) / total, difference, standard_error)
