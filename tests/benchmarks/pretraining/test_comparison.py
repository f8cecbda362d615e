"""The maths of the tables, on made-up results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pretraining_study import made_up_result

from benchmarks.pretraining.comparison import (
    cost_per_byte,
    difference,
    fit_power_law,
    interpolate,
    loss_for_tokens,
    losses,
    losses_at,
    tokens_for_loss,
)
from benchmarks.pretraining.runs import Run

RUN = Run("stdlib", 1000, "prenorm", 16, 4e-3)


def of_seeds(values: list[float | None], **changes):
    return [made_up_result(replace(RUN, seed=seed), value, **changes) for seed, value in enumerate(values)]


def test_the_paired_error_is_that_of_the_differences():
    baseline, arm = losses(of_seeds([2.0, 2.5, 3.0])), losses(of_seeds([1.9, 2.5, 2.8]))
    found = difference(arm, baseline)
    # Differences -0.1, 0, -0.2: mean -0.1, standard deviation 0.1.
    assert found.paired.difference == pytest.approx(-0.1)
    assert found.paired.standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert found.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert (found.num_seeds, found.verdict) == (3, "undecided")


def test_seeds_are_paired_by_their_number():
    found = difference({2: 1.0, 0: 3.0, 7: 9.0}, {0: 3.5, 1: 0.0, 2: 1.6})
    assert found.num_seeds == 2
    assert found.paired.difference == pytest.approx(-0.55)


@pytest.mark.parametrize(("shift", "verdict"), [(-0.5, "better"), (0.5, "worse")])
def test_a_difference_far_from_zero_is_decided(shift, verdict):
    baseline = {0: 2.0, 1: 2.5, 2: 3.0}
    arm = {seed: loss + shift + 0.01 * seed for seed, loss in baseline.items()}
    assert difference(arm, baseline).verdict == verdict


def test_one_seed_decides_nothing_and_divergence_has_no_difference():
    assert difference({0: 1.0}, {0: 2.0}).verdict == "undecided"
    assert difference(losses(of_seeds([1.0, None])), losses(of_seeds([2.0, 2.0]))) is None
    assert difference({}, {0: 2.0}) is None
    assert losses_at(of_seeds([None]), 500) == {0: math.inf}


def test_equal_time_reads_the_curve_at_the_bytes_that_cost_the_same():
    baseline, arm = of_seeds([2.0, 2.0], cpu_seconds=10.0), of_seeds([1.0, 1.4], cpu_seconds=16.0)
    ratio = cost_per_byte(arm) / cost_per_byte(baseline)
    assert ratio == pytest.approx(1.6)
    # The curves fall linearly from 5 nats: at 1 / 1.6 of the bytes, 5 - 4 / 1.6 and 5 - 3.6 / 1.6.
    assert losses_at(arm, 1000 / ratio) == pytest.approx({0: 2.5, 1: 2.75})
    assert losses_at(arm, 2000) == pytest.approx({0: 1.0, 1: 1.4})


def test_interpolation_is_linear_between_points_and_constant_outside():
    points = [(1.0, 4.0), (3.0, 2.0), (4.0, 0.0)]
    assert [interpolate(points, x) for x in (0.0, 1.0, 2.0, 3.5, 9.0)] == [4.0, 4.0, 3.0, 1.0, 0.0]


def test_a_power_law_is_found_and_inverted():
    points = [(tokens, 7 * tokens**-0.1) for tokens in (100.0, 200.0, 400.0)]
    law = fit_power_law(points)
    assert (law.factor, law.exponent) == (pytest.approx(7), pytest.approx(0.1))
    assert law.worst < 1e-12
    assert tokens_for_loss(points, 7 * 300**-0.1) == pytest.approx(300)
    assert loss_for_tokens(points, 300) == pytest.approx(7 * 300**-0.1)


def test_nothing_is_extrapolated():
    points = [(100.0, 3.0), (200.0, 2.0)]
    assert fit_power_law(points) is None
    assert [tokens_for_loss(points, loss) for loss in (3.1, 1.9)] == [None, None]
    assert [loss_for_tokens(points, tokens) for tokens in (99, 201)] == [None, None]
    assert loss_for_tokens([], 100) is None
