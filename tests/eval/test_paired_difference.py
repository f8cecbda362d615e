"""Paired differences and their standard errors against numpy and against simulated texts."""

import math

import numpy as np
import pytest

from hf_depthattn.eval.paired_difference import paired_difference


def test_means_have_the_standard_error_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 37))
    result = paired_difference(a, b)
    differences = b - a
    assert result.difference == pytest.approx(differences.mean())
    assert result.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(37))
    assert (result.value_a, result.value_b) == pytest.approx((a.mean(), b.mean()))


def test_ratios_with_equal_weights_are_means_of_ratios():
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 11))
    ratio = paired_difference(a, b, [4.0] * 11)
    mean = paired_difference(a / 4, b / 4)
    assert tuple(ratio) == pytest.approx(tuple(mean))


def test_the_standard_error_of_a_ratio_is_the_spread_over_samples():
    generator = np.random.default_rng(2)
    results = []
    for _ in range(2000):
        weights = generator.integers(10, 50, size=60).astype(float)
        noise = generator.normal(size=60) * np.sqrt(weights)
        results.append(paired_difference(2 * weights, 2 * weights + 0.1 * weights + noise, weights))
    spread = np.std([result.difference for result in results])
    assert np.mean([result.difference for result in results]) == pytest.approx(0.1, abs=0.01)
    assert np.mean([result.standard_error for result in results]) == pytest.approx(spread, rel=0.05)


def test_one_item_has_no_standard_error():
    assert math.isnan(paired_difference([1.0], [2.0]).standard_error)
