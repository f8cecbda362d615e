"""Tables of arms with several budgets, on made-up results."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pretraining_study import made_up_group, made_up_result, made_up_results, row_of

from benchmarks.pretraining import budget_tables
from benchmarks.pretraining.group import Group, groups
from benchmarks.pretraining.runs import Run


@pytest.fixture(scope="module")
def group() -> Group:
    return made_up_group()


def test_budgets_have_a_fit_and_the_budget_that_the_reference_needs(group):
    lines = budget_tables.budget_table(group)
    assert lines[0].startswith("| arm | 0.5k bytes | 1k bytes | 2k bytes | fit |")
    reference, block = (row_of(lines, label) for label in ("PreNorm", "Block AttnRes"))
    assert "T^-" in reference[4] and reference[5] == ""
    assert [cell.strip() for cell in block[5].split(",")][-1] == "beyond the largest"
    assert block[5].split(",")[0].endswith(" x")


def test_the_reference_is_trained_longer_where_a_budget_covers_it(group):
    lines = budget_tables.equal_time_by_budget(group)
    assert lines[0] == "| arm | baseline | bytes for it | 0.5k bytes | 1k bytes |"
    block = row_of(lines, "Block AttnRes")
    assert block[1:3] == ["PreNorm", "1.50 x"]
    # The arm is 0.1 nats below PreNorm, which gains 0.13 from 500 to 750 bytes and 0.07 from 1000 to 1500.
    assert float(block[3].split()[0]) > 0 > float(block[4].split()[0]) and "±" in block[3]


def test_rates_that_were_tried_with_another_budget_are_used_for_it(group):
    run = Run("stdlib", 2000, "block_attn_res", 16, 0.0)
    lower = {
        rate: made_up_result(replace(run, learning_rate=rate), 1.0 + abs(rate - 2e-3))
        for rate in (1e-3, 2e-3, 4e-3, 8e-3)
    }
    seeds = {seed: made_up_result(replace(run, learning_rate=2e-3, seed=seed), 1.0) for seed in (1, 2)}
    tuned = {result.run: result for result in (*lower.values(), *seeds.values())}
    (tuned_group,) = groups({**group.results, **tuned})
    assert dict(tuned_group.by_budget("block_attn_res"))[2000] == 1.0
    assert dict(tuned_group.by_budget("prenorm")) == dict(group.by_budget("prenorm"))
    both = [group, Group("stdlib", 2000, 16, tuned_group.results)]
    assert budget_tables.rates_by_budget(both)[2:] == ["| Block AttnRes | 0.004 | 0.002 |"]
    assert budget_tables.rates_by_budget([group]) == []
    (rates,) = budget_tables.rates_of_budgets(tuned_group)
    assert rates == "- Block AttnRes, 2k bytes: 0.001: 1.001, 0.002: 1.000, 0.004: 1.002, 0.008: 1.006."
    assert budget_tables.rates_of_budgets(group) == []


def test_an_arm_that_was_not_tuned_is_marked_beside_a_baseline_that_was(group):
    run = Run("stdlib", 2000, "prenorm", 16, 0.0)
    rates = [replace(run, learning_rate=rate) for rate in (2e-3, 4e-3, 8e-3)]
    tuned = {rate: made_up_result(rate, 1.0 + abs(rate.learning_rate - 4e-3)) for rate in rates}
    tuned_group = replace(group, results={**group.results, **tuned})
    lines = [budget_tables.budget_table(each) for each in (group, tuned_group)]
    cells = [row_of(of_group, "Block AttnRes")[3] for of_group in lines]
    assert [cell.endswith(", untuned)") for cell in cells] == [False, True]
    assert not any("untuned" in cell for of_group in lines for cell in row_of(of_group, "Block AttnRes")[1:3])


def test_budgets_are_compared_over_the_seeds_that_all_of_them_have(group):
    first = group.plan.seeds("block_attn_res")[0]
    fourth = made_up_result(replace(first, seed=3), 100.0)
    more = replace(group, results={**group.results, fourth.run: fourth})
    assert more.by_budget("block_attn_res") == group.by_budget("block_attn_res")
    (block,) = (row_of(budget_tables.budget_table(more), "Block AttnRes"),)
    assert float(block[2].split()[0]) > 20, "the loss of a single budget is the mean of all its seeds"


def test_equal_time_is_that_of_the_seeds_that_both_have(group):
    fourth = made_up_result(replace(group.plan.seeds("block_attn_res")[0], seed=3), 100.0, 15.0)
    more = replace(group, results={**group.results, fourth.run: fourth})
    assert more.at_equal_time("block_attn_res", "prenorm") == group.at_equal_time("block_attn_res", "prenorm")
    assert not more.at_equal_time("block_attn_res", "prenorm").is_mid_run


def test_without_other_budgets_there_are_no_tables():
    (group,) = groups(made_up_results())
    assert budget_tables.budget_table(group) == budget_tables.equal_time_by_budget(group) == []
