"""The results of one corpus and budget: arms, seeds, and comparisons with baselines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from .arms import ARMS, REFERENCE, SCALED
from .comparison import Difference, cost_per_byte, difference, losses, losses_at
from .plan import Plan, Study
from .results import Result, Results
from .runs import Run

_CORPORA = {"stdlib": "Python's standard library", "books": "books (English prose)"}


@dataclass(frozen=True)
class Group:
    """The results of one corpus, one budget and one number of layers, with those of other depths and budgets.

    Attributes:
        corpus, tokens, num_layers: what its runs have in common.
        results: all results.
    """

    corpus: str
    tokens: int
    num_layers: int
    results: Results

    @cached_property
    def plan(self) -> Plan:
        """The plan of its runs; it knows the best rates. Seeds are those that were trained."""
        num_seeds = 1 + max(run.seed for run in self.results)
        study = Study(self.corpus, self.tokens, num_layers=self.num_layers, num_seeds=num_seeds)
        return Plan(study, {run: result.loss for run, result in self.results.items()})

    @property
    def reference(self) -> str:
        """The arm that the others are measured by: PreNorm, else scaled PreNorm."""
        return REFERENCE if self.plan.best(REFERENCE) is not None else SCALED

    @property
    def better_baseline(self) -> str | None:
        """Scaled PreNorm, if it was trained."""
        return SCALED if self.plan.best(SCALED) is not None else None

    def baseline_of(self, arm: str) -> str | None:
        """Return the arm that another one is compared with: its baseline if trained, else the reference.

        Args:
            arm: name of the arm.

        Returns:
            The name, or `None` for arms that are baselines only.
        """
        if arm in (ARMS[arm].baseline, self.reference):
            return None
        return ARMS[arm].baseline if self.plan.best(ARMS[arm].baseline) is not None else self.reference

    @property
    def label(self) -> str:
        """Its corpus, budget and number of layers as the head of a column."""
        return f"{self.corpus}, {in_bytes(self.tokens)}, {self.num_layers} layers"

    @property
    def title(self) -> str:
        """Its corpus, budget and number of layers in words."""
        label = _CORPORA.get(self.corpus, self.corpus)
        return f"{label}, {in_bytes(self.tokens)} a run, {self.num_layers} layers"

    def found(self, runs: Iterable[Run]) -> list[Result]:
        """Return the results of those runs that are finished.

        Args:
            runs: the runs.
        """
        return [self.results[run] for run in runs if run in self.results]

    def of_seeds(self, arm: str) -> list[Result]:
        """Return the results of an arm with its best rate, one per seed.

        Args:
            arm: name of the arm.
        """
        return self.found(self.plan.seeds(arm))

    def tried(self, arm: str) -> list[Result]:
        """Return the results of all rates of an arm on seed 0, in ascending order.

        Args:
            arm: name of the arm.
        """
        found = [result for run, result in self.results.items() if self._is_tried(run, arm)]
        return sorted(found, key=lambda result: (result.run.learning_rate, result.run.depth_lr_factor))

    def _is_tried(self, run: Run, arm: str) -> bool:
        same = (self.corpus, self.tokens, self.num_layers, arm, 0)
        return (run.corpus, run.tokens, run.num_layers, run.arm, run.seed) == same

    def arms(self, *, is_continued: bool) -> list[str]:
        """Return the arms with a best rate, trained from scratch or continued.

        Args:
            is_continued: which of the two.
        """
        return [
            name
            for name, arm in ARMS.items()
            if (arm.start is not None) == is_continued and self.plan.best(name) is not None
        ]

    def cost_ratio(self, arm: str, baseline: str) -> float:
        """Return the CPU time of an arm per byte, relative to a baseline.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        own, other = (cost_per_byte([*self.tried(name), *self.of_seeds(name)]) for name in (arm, baseline))
        return own / other

    def at_equal_tokens(self, arm: str, baseline: str) -> Difference | None:
        """Return the difference to a baseline at the end of training.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        return difference(losses(self.of_seeds(arm)), losses(self.of_seeds(baseline)))

    def at_equal_time(self, arm: str, baseline: str) -> Difference | None:
        """Return the difference to a baseline when the arm has used as much CPU time as the whole baseline.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        then = losses_at(self.of_seeds(arm), self.tokens / self.cost_ratio(arm, baseline))
        return difference(then, losses(self.of_seeds(baseline)))

    def by_budget(self, arm: str) -> list[tuple[float, float]]:
        """Return budgets and mean losses over seeds at the end of training, for budgets that all seeds have.

        Args:
            arm: name of the arm.
        """
        budgets = sorted({run.tokens for run in self.results if run.arm == arm and run.corpus == self.corpus})
        points = []
        for tokens in budgets:
            runs = self.plan.at_budget(arm, tokens)
            found = self.found(runs)
            if found and len(found) == len(runs):
                points.append((float(tokens), statistics.fmean(result.loss for result in found)))
        return points


def groups(results: Results) -> list[Group]:
    """Return the groups in which PreNorm or scaled PreNorm has a best rate, per corpus those with most arms first.

    Args:
        results: all results.
    """
    keys = sorted({(run.corpus, run.tokens, run.num_layers) for run in results})
    found = [group for key in keys if (group := Group(*key, results)).plan.best(group.reference) is not None]
    return sorted(
        found, key=lambda group: (group.corpus != "stdlib", group.corpus, -len(group.arms(is_continued=False)))
    )


def in_bytes(number: float) -> str:
    """Return a number of bytes in words, e.g. `2M bytes`.

    Args:
        number: the number.
    """
    return f"{number / 1e6:g}M bytes" if number >= 1e6 else f"{number / 1e3:g}k bytes"
