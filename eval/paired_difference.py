"""Paired differences between two models on the same items, with standard errors.

Both models answer the same items, and the per-item differences vary far less than the scores themselves. For the
differences d_i of n items, the standard error of the mean is

    se = sqrt(sum (d_i - mean)^2 / (n - 1)) / sqrt(n).

Bits per byte and nats per token are ratios of sums. Their standard error is that of a linearised ratio estimator,
where w_i is the number of bytes or tokens of text i:

    D = sum d_i / sum w_i,    se = sqrt(n / (n - 1) * sum (d_i - D w_i)^2) / sum w_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Paired(NamedTuple):
    """Values of A and B, the difference B - A, and its standard error (NaN for a single item or a missing value)."""

    value_a: float
    value_b: float
    difference: float
    standard_error: float


def paired_difference(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> Paired:
    """Return the paired difference of two means, or of two ratios of sums.

    Args:
        a: values of A, one per item.
        b: values of B for the same items.
        weights: denominator of each item; 1 by default, which gives means.
    """
    weights = [1.0] * len(a) if weights is None else weights
    total = sum(weights)
    difference = sum(y - x for x, y in zip(a, b, strict=True)) / total
    n = len(a)
    squares = sum((y - x - difference * w) ** 2 for x, y, w in zip(a, b, weights, strict=True))
    standard_error = math.sqrt(n / (n - 1) * squares) / total if n > 1 else math.nan
    return Paired(sum(a) / total, sum(b) / total, difference, standard_error)
