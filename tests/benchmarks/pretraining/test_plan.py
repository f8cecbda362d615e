"""Which runs of the study can start, given the results so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.plan import MAX_RATES, Plan, Study
from benchmarks.pretraining.runs import Run


def carried_out(study: Study, loss: Callable[[Run], float]) -> dict[Run, float]:
    """Return the losses of all runs of a study, in the order in which they were carried out."""
    losses: dict[Run, float] = {}
    while missing := Plan(study, losses).missing():
        losses[missing[0]] = loss(missing[0])
    return losses


def distance_to(best: float) -> Callable[[Run], float]:
    return lambda run: abs(math.log(run.learning_rate / best))


def test_rates_are_tried_on_seed_0_and_only_the_best_on_the_others():
    runs = list(carried_out(Study("stdlib", 100, ("prenorm",)), distance_to(4e-3)))
    assert [(run.learning_rate, run.seed) for run in runs] == [(2e-3, 0), (4e-3, 0), (8e-3, 0), (4e-3, 1), (4e-3, 2)]


def test_a_best_rate_at_the_edge_is_followed_until_it_is_inside():
    for best, added in ((2e-3, 1e-3), (8e-3, 1.6e-2)):
        losses = carried_out(Study("stdlib", 100, ("prenorm",)), distance_to(best))
        assert {run.learning_rate for run in losses} == {2e-3, 4e-3, 8e-3, added}
        assert Plan(Study("stdlib", 100, ("prenorm",)), losses).best("prenorm").learning_rate == best
    losses = carried_out(Study("stdlib", 100, ("prenorm",)), distance_to(1.0))
    assert sum(run.seed == 0 for run in losses) == MAX_RATES


def test_an_arm_that_diverges_everywhere_is_tried_with_smaller_rates():
    study = Study("stdlib", 100, ("postnorm",), num_seeds=1)
    losses = carried_out(study, lambda run: math.inf if run.learning_rate > 3e-4 else 3e-4 - run.learning_rate)
    assert sorted(run.learning_rate for run in losses) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]
    assert Plan(study, losses).best("postnorm").learning_rate == 2.5e-4


def test_continued_models_wait_for_the_model_of_their_own_seed_and_the_rate_of_their_control():
    names = ("prenorm_scaled", "retrofit_control", "retrofit_moda")
    losses = carried_out(Study("stdlib", 100, names), distance_to(2e-3))
    done = list(losses)
    continued = [run for run in done if ARMS[run.arm].start is not None]
    assert continued
    for run in continued:
        assert run.start in done[: done.index(run)], run
        assert (run.start.arm, run.start.seed, run.start.learning_rate) == ("prenorm_scaled", run.seed, 2e-3)
    moda = [run for run in done if run.arm == "retrofit_moda"]
    assert {run.learning_rate for run in moda} == {2e-3}
    # All factors have the same loss here; the first is at the edge, so that smaller ones are tried.
    assert [(run.depth_lr_factor, run.seed) for run in moda][:4] == [(1, 0), (3, 0), (10, 0), (0.3, 0)]


def test_a_best_factor_at_the_edge_is_followed_until_it_is_inside():
    names = ("prenorm_scaled", "retrofit_control", "retrofit_moda")
    for best, added in ((1.0, [0.3]), (10.0, [30.0]), (0.3, [0.3, 0.1]), (3.0, [])):
        losses = carried_out(
            Study("stdlib", 100, names),
            lambda run, best=best: abs(math.log(run.learning_rate / 4e-3)) + abs(math.log(run.depth_lr_factor / best)),
        )
        moda = [run for run in losses if run.arm == "retrofit_moda"]
        assert [run.depth_lr_factor for run in moda if run.seed == 0] == [1, 3, 10, *added]
        assert {run.depth_lr_factor for run in moda if run.seed} == {best}


def test_depths_and_budgets_use_the_best_rate():
    study = Study(
        *("stdlib", 100, ("prenorm", "moda")),
        depths=(8, 32),
        depth_arms=("moda",),
        budgets=(50, 200),
        budget_arms=("prenorm",),
    )
    plan = Plan(study, carried_out(study, distance_to(4e-3)))
    others = [run for run in plan.losses if run.num_layers != 16 or run.tokens != 100]
    assert others == [
        *plan.at_depth("moda", 8),
        *plan.at_depth("moda", 32),
        *plan.at_budget("prenorm", 50),
        *plan.at_budget("prenorm", 200),
    ]
    assert len(others) == 12 and {run.learning_rate for run in others} == {4e-3}


def test_a_budget_has_the_rates_of_the_next_smaller_one_where_they_were_tried():
    losses = carried_out(Study("stdlib", 100, ("prenorm",)), distance_to(4e-3))
    losses |= carried_out(Study("stdlib", 400, ("prenorm",)), distance_to(1e-3))
    # One rate alone is no choice.
    losses[Run("stdlib", 800, "prenorm", 16, 8e-3)] = 0.0
    plan = Plan(Study("stdlib", 100, ("prenorm",)), losses)
    rates = {tokens: plan.at_budget("prenorm", tokens)[0].learning_rate for tokens in (50, 100, 200, 400, 900)}
    assert rates == {50: 4e-3, 100: 4e-3, 200: 4e-3, 400: 1e-3, 900: 1e-3}
    assert {run.tokens for run in plan.at_budget("prenorm", 900)} == {900}


def test_runs_that_can_start_do_not_depend_on_each_other():
    study = Study("stdlib", 100, ("prenorm", "moda"))
    missing = Plan(study, {}).missing()
    assert [run.arm for run in missing] == 3 * ["prenorm"] + 3 * ["moda"]
    assert {run.seed for run in missing} == {0}
