"""The order of runs: which can start, given the results so far.

Every arm is first trained on seed 0 with several learning rates; the best one is then used for the other seeds, for
other numbers of layers and for other budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from .arms import ARMS
from .runs import Run

#: An arm is never tried with more learning rates than this.
MAX_RATES = 6


@dataclass(frozen=True)
class Study:
    """What is to be trained.

    Attributes:
        corpus: name of the corpus.
        tokens: training budget in bytes.
        arms: names of arms.
        num_layers: number of decoder layers.
        num_seeds: number of seeds.
        depths: further numbers of layers, for `depth_arms`.
        budgets: further budgets, for `budget_arms`.
    """

    corpus: str
    tokens: int
    arms: tuple[str, ...] = tuple(ARMS)
    num_layers: int = 16
    num_seeds: int = 3
    depths: tuple[int, ...] = ()
    depth_arms: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    budget_arms: tuple[str, ...] = ()


def _next_factor(factor: float, is_up: bool) -> float:
    """Return the next larger or smaller of ..., 0.1, 0.3, 1, 3, 10, ..."""
    half_decades = round(2 * math.log10(factor)) + (1 if is_up else -1)
    return float(f"{10 ** (half_decades / 2):.1g}")


@dataclass(frozen=True)
class Plan:
    """The runs of a study.

    Attributes:
        study: what is to be trained.
        losses: held-out losses of finished runs, infinite if training diverged.
    """

    study: Study
    losses: Mapping[Run, float]

    def missing(self) -> list[Run]:
        """Return the runs that have no result and whose learning rate and start are known, in the order of work."""
        return list(dict.fromkeys(run for run in self._wanted() if run not in self.losses))

    def best(self, arm: str) -> Run | None:
        """Return the run on seed 0 with the best rates, or `None` if some have not been tried.

        Args:
            arm: name of the arm.
        """
        tried = self._tried(arm)
        return min(tried, key=self.losses.__getitem__) if tried and self._are_finished(tried) else None

    def seeds(self, arm: str) -> list[Run]:
        """Return the runs with the best rates, one per seed, or none if the best rates are not known.

        Args:
            arm: name of the arm.
        """
        return self._of_seeds(self.best(arm))

    def at_depth(self, arm: str, num_layers: int) -> list[Run]:
        """Return the runs of an arm with another number of layers, with the rates that are best there if tried.

        Args:
            arm: name of the arm.
            num_layers: number of layers.
        """
        return self._tuned(arm, num_layers=num_layers) or [
            replace(run, num_layers=num_layers) for run in self.seeds(arm)
        ]

    def at_budget(self, arm: str, tokens: int) -> list[Run]:
        """Return the runs of an arm with another budget, with the rates that are best there if they were tried.

        Otherwise with those of the next smaller budget with which they were tried, or else of that of the study.

        Args:
            arm: name of the arm.
            tokens: budget in bytes.
        """
        smaller = {run.tokens for run in self.losses if run.arm == arm and run.tokens < tokens}
        for budget in [tokens, *sorted(smaller, reverse=True)]:
            if tuned := self._tuned(arm, tokens=budget):
                return [replace(run, tokens=tokens) for run in tuned]
        return [replace(run, tokens=tokens) for run in self.seeds(arm)]

    def _tuned(self, arm: str, **change: int) -> list[Run]:
        return Plan(replace(self.study, **change), self.losses).seeds(arm)  # type: ignore[arg-type]

    def _wanted(self) -> Iterator[Run]:
        for arm in self.study.arms:
            yield from self._tried(arm)
            yield from self.seeds(arm)
        for arm in self.study.depth_arms:
            for num_layers in self.study.depths:
                yield from self.at_depth(arm, num_layers)
        for arm in self.study.budget_arms:
            for tokens in self.study.budgets:
                yield from self.at_budget(arm, tokens)

    def _tried(self, name: str) -> list[Run]:
        """Return the runs on seed 0 whose rates are compared; none if they depend on runs that are not finished."""
        arm, study = ARMS[name], self.study
        start_rate = None
        if arm.start is not None:
            starts = self.seeds(arm.start)
            if not starts or not self._are_finished(starts):
                return []
            start_rate = starts[0].learning_rate
        run = Run(study.corpus, study.tokens, name, study.num_layers, 0.0, start_rate=start_rate)
        if len(arm.depth_lr_factors) > 1:
            of_baseline = self.best(arm.baseline)
            if of_baseline is None:
                return []
            run = replace(run, learning_rate=of_baseline.learning_rate)
            tried = [replace(run, depth_lr_factor=factor) for factor in sorted(arm.depth_lr_factors)]
            return self._with_neighbours(
                tried, lambda run, up: replace(run, depth_lr_factor=_next_factor(run.depth_lr_factor, up))
            )
        tried = [replace(run, learning_rate=rate) for rate in sorted(arm.learning_rates)]
        return self._with_neighbours(
            tried, lambda run, up: replace(run, learning_rate=run.learning_rate * (2 if up else 0.5))
        )

    def _with_neighbours(self, tried: list[Run], beyond: Callable[[Run, bool], Run]) -> list[Run]:
        """Add runs beyond the best one while it has the smallest or the largest rate."""
        while self._are_finished(tried) and len(tried) < MAX_RATES:
            best = min(tried, key=self.losses.__getitem__)
            if best == tried[0]:
                tried = [beyond(best, False), *tried]
            elif best == tried[-1]:
                tried = [*tried, beyond(best, True)]
            else:
                break
        return tried

    def _of_seeds(self, best: Run | None) -> list[Run]:
        return [] if best is None else [replace(best, seed=seed) for seed in range(self.study.num_seeds)]

    def _are_finished(self, runs: list[Run]) -> bool:
        return all(run in self.losses for run in runs)
