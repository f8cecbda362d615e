"""Conclusions of the study, on made-up results."""

from __future__ import annotations

import re

import pytest
from pretraining_study import loss_of, made_up_group, made_up_results, row_of

from benchmarks.pretraining import conclusions
from benchmarks.pretraining.group import Group, groups
from benchmarks.pretraining.plan import Study


@pytest.fixture(scope="module")
def group() -> Group:
    return made_up_group()


def without_numbers(line: str) -> str:
    return re.sub(r" \([+-][^)]*\)\)?", "", line)


def test_the_summary_names_every_arm_once_per_condition(group):
    initial_weights, tokens, own_tokens, time, own_time = conclusions.summary(group)
    assert "scaled PreNorm against PreNorm, an effect of the initial weights: better by 0.3" in initial_weights
    assert without_numbers(tokens) == (
        "- At equal bytes, against scaled PreNorm: better: scaled Block AttnRes; worse: MoDA with post-norm; a run "
        "diverged: Post-norm."
    )
    assert without_numbers(own_tokens) == (
        "- At equal bytes, each against its baseline: better: Block AttnRes; worse: Block AttnRes with static "
        "weights; not decided: MoDA."
    )
    assert "worse: scaled Block AttnRes (+0.9" in time and "(mid-run)" in time
    assert "better: Block AttnRes (-0.04" in own_time


def test_without_the_better_baseline_arms_are_compared_with_their_own():
    results = {run: result for run, result in made_up_results().items() if run.arm in ("prenorm", "block_attn_res")}
    (group,) = groups(results)
    tokens, _ = conclusions.summary(group)
    assert tokens.startswith("- At equal bytes, each against its baseline: better: Block AttnRes (-0.1")


@pytest.fixture(scope="module")
def two_groups(group) -> list[Group]:
    other = Study("books", 500, ("prenorm_scaled", "block_attn_res_scaled"), num_layers=8)
    return groups({**group.results, **made_up_results(study=other)})


def test_settings_are_beside_each_other(two_groups):
    assert [group.corpus for group in two_groups] == ["stdlib", "books"]
    lines = conclusions.settings_table(two_groups, equal_time=False)
    assert lines[0] == "| arm | CPU time of a byte | stdlib, 1k bytes, 16 layers | books, 0.5k bytes, 8 layers |"
    assert row_of(lines, "scaled PreNorm")[1:] == ["1.00 x", "1.994", "2.202"]
    ratio, *differences = row_of(lines, "scaled Block AttnRes")[1:]
    assert ratio == "1.50 x" and all(cell.startswith("-0.1") for cell in differences)
    assert len(lines) == 4
    lines = conclusions.settings_table(two_groups, equal_time=True)
    assert all(cell.startswith("+") for cell in row_of(lines, "scaled Block AttnRes")[2:])
    assert len(lines) == 3
    assert conclusions.settings_table(two_groups[:1], equal_time=False) == []


def test_arms_are_sorted_by_their_verdicts_at_equal_time(two_groups, monkeypatch):
    assert conclusions.equal_time_sentence(two_groups) == [
        "- At equal CPU time, against scaled PreNorm: worse in all: scaled Block AttnRes."
    ]
    assert conclusions.equal_time_sentence(two_groups[:1]) == []
    monkeypatch.setattr(Group, "at_equal_time", lambda group, *arms: group.corpus == "books" or None)
    monkeypatch.setattr(conclusions, "_verdict", lambda found: "better" if found else "worse")
    assert conclusions.equal_time_sentence(two_groups) == [
        "- At equal CPU time, against scaled PreNorm: better in some settings: scaled Block AttnRes (1 of 2)."
    ]
    monkeypatch.setattr(conclusions, "_verdict", lambda found: "undecided" if found else "worse")
    assert conclusions.equal_time_sentence(two_groups)[0].endswith(": neither: scaled Block AttnRes.")


def test_verdicts_are_counted_over_settings(two_groups):
    block, others, retrofit = conclusions.conclusions(two_groups)
    assert block == (
        "- **scaled Block AttnRes** against scaled PreNorm: at equal bytes better in all 2 settings (by 0.100 nats "
        f"per byte); at equal CPU time worse in all 2 settings{block.rsplit('settings', 1)[1]}"
    )
    assert "a run diverged: Post-norm" in others and "worse: MoDA with post-norm" in others
    assert retrofit.startswith("- **retrofitted gated MoDA** against continued PreNorm (Python's standard library, ")


def test_differences_are_given_by_budget_where_there_are_three():
    more = {"budgets": (500, 2000), "budget_arms": ("prenorm_scaled", "block_attn_res_scaled")}
    said = [line for line in conclusions.conclusions(groups(made_up_results(**more))) if " by bytes " in line]
    assert len(said) == 1 and said[0].startswith("- **scaled Block AttnRes** by bytes (stdlib, 16 layers): -0.1")
    assert said[0].endswith(" with 0.5k, 1k, 2k bytes.") and said[0].count("-0.100") == 3


def test_counts_say_what_differs():
    (group,) = groups(made_up_results())
    better, worse = (
        group.at_equal_tokens(*pair) for pair in (("prenorm_scaled", "prenorm"), ("prenorm", "prenorm_scaled"))
    )
    assert conclusions._counts([better, worse, None, worse]) == (
        "better in 1 of 4 settings (by 0.300 nats per byte), worse in 2 (by 0.300 nats per byte), diverged in 1"
    )


def test_a_retrofit_is_better_from_the_first_evaluation_after_which_it_stays_better(group):
    (said,) = conclusions.retrofit_sentences(group)
    # The made-up curves are lower from the first evaluation on, and the arm takes twice the time.
    assert "at equal bytes better from 0.25k bytes on (-0.060" in said and "at the end, 1k bytes)" in said
    assert "at equal CPU time worse by" in said


def test_a_retrofit_that_is_first_better_at_the_last_evaluation_is_only_better_at_the_end(group, monkeypatch):
    verdicts = iter(["worse"] * (len(group.of_seeds("retrofit_moda")[0].heldout_curve) - 2) + ["better"])
    monkeypatch.setattr(conclusions, "_verdict", lambda found: next(verdicts))
    (said,) = conclusions.retrofit_sentences(group)
    assert "at equal bytes better only at the end (-0.060" in said


def test_a_retrofit_that_is_only_better_in_between_is_not_said_to_be_better():
    def loss(run):
        # Seeds disagree.
        of_run = loss_of(run)
        return of_run + 0.2 if run.arm == "retrofit_moda" and run.seed == 1 else of_run

    (group,) = groups(made_up_results(loss))
    (said,) = conclusions.retrofit_sentences(group)
    assert "at equal bytes not better for certain (" in said
