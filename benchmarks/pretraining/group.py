"""The results of one corpus and budget: arms, seeds, and comparisons with baselines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from .arms import ARMS, REFERENCE, SCALED
from .comparison import Difference, cost_per_byte, difference, loss_for_tokens, losses, losses_at
from .costs import Costs, cost_key
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
        costs: CPU time of arms, as measured in turn.
    """

    corpus: str
    tokens: int
    num_layers: int
    results: Results
    costs: Costs = field(default_factory=dict)

    @cached_property
    def plan(self) -> Plan:
        """The plan of its runs; it knows the best rates. Seeds are those that were trained."""
        study = Study(self.corpus, self.tokens, num_layers=self.num_layers, num_seeds=self.num_seeds)
        return Plan(study, {run: result.loss for run, result in self.results.items()})

    @property
    def num_seeds(self) -> int:
        """Number of seeds of all results."""
        return 1 + max(run.seed for run in self.results)

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

        It is the one that was measured in turn, else that of their runs.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        own, other = (self.costs.get(cost_key(self.num_layers, ARMS[name].fields)) for name in (arm, baseline))
        if own is None or other is None:
            own, other = (self._cost_of_runs(name) for name in (arm, baseline))
        return own / other

    def _cost_of_runs(self, arm: str) -> float:
        results = {result.run: result for result in (*self.tried(arm), *self.of_seeds(arm))}
        return cost_per_byte(list(results.values()))

    def at_equal_tokens(self, arm: str, baseline: str) -> Difference | None:
        """Return the difference to a baseline at the end of training.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        return difference(losses(self.of_seeds(arm)), losses(self.of_seeds(baseline)))

    def at_equal_time(self, arm: str, baseline: str) -> Difference | None:
        """Return the difference to a baseline that is trained for so many bytes that both take the same CPU time.

        The loss of the baseline is interpolated between its budgets, per seed. Where these do not cover it, the loss
        of the arm in the middle of its run is taken, when its baseline is done. An arm that takes less time is
        compared at equal bytes.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
        """
        own, other, ratio = self.of_seeds(arm), self.of_seeds(baseline), max(1.0, self.cost_ratio(arm, baseline))
        longer = self.losses_for(baseline, self.tokens * ratio)
        if longer.keys() >= losses(own).keys() & losses(other).keys():
            return difference(losses(own), longer)
        found = difference(losses_at(own, self.tokens / ratio), losses(other))
        return None if found is None else replace(found, is_mid_run=True)

    def losses_at_budget(self, arm: str, tokens: int) -> dict[int, float]:
        """Return the losses at the end of training with a budget that was trained, by seed.

        Args:
            arm: name of the arm.
            tokens: the budget in bytes.
        """
        return losses(self.found(self.plan.at_budget(arm, tokens)))

    def losses_at_depth(self, arm: str, num_layers: int) -> dict[int, float]:
        """Return the losses at the end of training with a number of layers, by seed.

        Args:
            arm: name of the arm.
            num_layers: number of layers.
        """
        return losses(self.found(self.plan.at_depth(arm, num_layers)))

    def losses_for(self, arm: str, tokens: float) -> dict[int, float]:
        """Return the losses at the end of training with a budget, interpolated between those that were trained.

        Args:
            arm: name of the arm.
            tokens: the budget in bytes.

        Returns:
            Seed -> loss, for seeds whose budgets cover it.
        """
        points: dict[int, list[tuple[float, float]]] = {}
        for budget in self.budgets(arm):
            for seed, loss in self.losses_at_budget(arm, budget).items():
                points.setdefault(seed, []).append((float(budget), loss))
        found = {seed: loss_for_tokens(of_seed, tokens) for seed, of_seed in points.items()}
        return {seed: loss for seed, loss in found.items() if loss is not None}

    @property
    def depths(self) -> list[int]:
        """Numbers of layers of this corpus and budget, in ascending order."""
        here = (self.corpus, self.tokens)
        return sorted({run.num_layers for run in self.results if (run.corpus, run.tokens) == here})

    def budgets(self, arm: str) -> list[int]:
        """Return the budgets of an arm in this corpus and at this depth, in ascending order.

        Args:
            arm: name of the arm.
        """
        here = (self.corpus, self.num_layers, arm)
        return sorted({run.tokens for run in self.results if (run.corpus, run.num_layers, run.arm) == here})

    def is_untuned(self, arm: str, baseline: str, tokens: int) -> bool:
        """Return whether all rates of the baseline were tried with a budget, but not those of the arm.

        Args:
            arm: name of the arm.
            baseline: name of the baseline.
            tokens: the budget in bytes.
        """
        plan = replace(self, tokens=tokens).plan
        return plan.best(baseline) is not None and plan.best(arm) is None

    def by_budget(self, arm: str) -> list[tuple[float, float]]:
        """Return budgets and mean losses at the end of training, over the seeds that were trained with all of them.

        Args:
            arm: name of the arm.
        """
        losses_of = {tokens: self.losses_at_budget(arm, tokens) for tokens in self.budgets(arm)}
        finished = {tokens: by_seed for tokens, by_seed in losses_of.items() if by_seed}
        if not finished:
            return []
        seeds = set.intersection(*(set(by_seed) for by_seed in finished.values()))
        return [
            (float(tokens), statistics.fmean(by_seed[seed] for seed in seeds)) for tokens, by_seed in finished.items()
        ]


def groups(results: Results, costs: Costs | None = None) -> list[Group]:
    """Return the groups in which PreNorm or scaled PreNorm has a best rate, per corpus those with most arms first.

    Args:
        results: all results.
        costs: CPU time of arms, as measured in turn.
    """
    keys = sorted({(run.corpus, run.tokens, run.num_layers) for run in results})
    found = [
        group for key in keys if (group := Group(*key, results, costs or {})).plan.best(group.reference) is not None
    ]
    return sorted(
        found, key=lambda group: (group.corpus != "stdlib", group.corpus, -len(group.arms(is_continued=False)))
    )


def in_bytes(number: float) -> str:
    """Return a number of bytes in words, e.g. `2M bytes`.

    Args:
        number: the number.
    """
    return f"{number / 1e6:.3g}M bytes" if number >= 1e6 else f"{number / 1e3:.3g}k bytes"
