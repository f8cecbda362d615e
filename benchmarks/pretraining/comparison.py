"""Compare arms: paired differences over seeds, at equal tokens and at equal CPU time, and the tokens that they save.

For seeds s, each arm has one loss with the weights and the order of the data of that seed. Differences are taken per
seed, and their interval is that of Student's t distribution, which is wide for three seeds: 4.3 standard errors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_depthattn.eval.paired_difference import Paired, paired_difference

from .results import Result

#: 97.5 % quantile of Student's t distribution by degrees of freedom, and of the normal distribution beyond.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL_QUANTILE = 1.96


@dataclass(frozen=True)
class Difference:
    """A paired difference between an arm and its baseline, in nats per byte.

    Attributes:
        paired: both means, the difference, arm minus baseline, and its standard error.
        num_seeds: number of pairs.
        is_mid_run: whether the loss of one of them is that in the middle of a longer run.
    """

    paired: Paired
    num_seeds: int
    is_mid_run: bool = False

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval; NaN for one seed."""
        degrees = self.num_seeds - 1
        quantile = _T_QUANTILES[degrees - 1] if 0 < degrees <= len(_T_QUANTILES) else _NORMAL_QUANTILE
        return quantile * self.paired.standard_error

    @property
    def verdict(self) -> str:
        """`"better"` or `"worse"` if the interval excludes zero, else `"undecided"`."""
        if not abs(self.paired.difference) > self.half_width:
            return "undecided"
        return "better" if self.paired.difference < 0 else "worse"


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return the paired difference of two arms, or `None` if a loss is infinite or no seed is common.

    Args:
        arm: seed -> loss.
        baseline: the same of the baseline.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    pairs = [(baseline[seed], arm[seed]) for seed in seeds]
    if not pairs or not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return None
    before, after = zip(*pairs, strict=True)
    return Difference(paired_difference(before, after), len(seeds))


def losses(results: Sequence[Result]) -> dict[int, float]:
    """Return the held-out loss at the end by seed.

    Args:
        results: results of one arm with different seeds.
    """
    return {result.run.seed: result.loss for result in results}


def cost_per_byte(results: Sequence[Result]) -> float:
    """Return the median CPU time of training per byte, in seconds.

    Args:
        results: results of one arm; rates and seeds do not change its cost.
    """
    return statistics.median(result.cpu_seconds / result.tokens for result in results)


def losses_at(results: Sequence[Result], tokens: float) -> dict[int, float]:
    """Return the held-out loss during training by seed, interpolated between evaluations.

    The learning rate has not come down yet, so that this is more than a run of this length would reach.

    Args:
        results: results of one arm with different seeds.
        tokens: bytes seen; beyond the last evaluation, its loss is returned.

    Returns:
        Seed -> loss, infinite if training diverged.
    """
    return {
        result.run.seed: math.inf
        if result.is_diverged
        else interpolate([(x, y) for x, _, y in result.heldout_curve], tokens)
        for result in results
    }


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value of a piecewise linear function, constant outside of its points.

    Args:
        points: arguments, in ascending order, and values.
        x: the argument.
    """
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, (x - x0) / (x1 - x0))
    return points[-1][1]


@dataclass(frozen=True)
class PowerLaw:
    """A fit of the loss, `factor * tokens ** -exponent`.

    Attributes:
        factor, exponent: its parameters.
        worst: the largest relative deviation of a fitted loss.
    """

    factor: float
    exponent: float
    worst: float


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """Fit a power law by least squares of the logarithms, or return `None` for fewer than three points.

    Args:
        points: budgets and losses at the end of training.
    """
    if len(points) < 3:
        return None
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    factor = math.exp(mean_y - slope * mean_x)
    worst = max(abs(loss / (factor * tokens**slope) - 1) for tokens, loss in points)
    return PowerLaw(factor, -slope, worst)


def tokens_for_loss(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return the budget with which an arm reaches a loss, or `None` outside of the budgets that were trained.

    Args:
        points: budgets, in ascending order, and losses at the end of training.
        loss: the loss.
    """
    for (tokens0, loss0), (tokens1, loss1) in pairwise(points):
        if loss1 <= loss <= loss0 and loss1 < loss0:
            part = (math.log(loss0) - math.log(loss)) / (math.log(loss0) - math.log(loss1))
            return math.exp(math.log(tokens0) + part * (math.log(tokens1) - math.log(tokens0)))
    return None


def loss_for_tokens(points: Sequence[tuple[float, float]], tokens: float) -> float | None:
    """Return the loss at the end of training with a budget, or `None` outside of the budgets that were trained.

    Args:
        points: budgets, in ascending order, and losses at the end of training.
        tokens: the budget.
    """
    if not points or not points[0][0] <= tokens <= points[-1][0]:
        return None
    return math.exp(interpolate([(math.log(x), math.log(y)) for x, y in points], math.log(tokens)))
