"""Tables and sentences of the study, on made-up results."""

from __future__ import annotations

import pytest
from pretraining_study import made_up_group, made_up_result, made_up_results, row_of

from benchmarks.pretraining import tables
from benchmarks.pretraining.group import Group, groups
from benchmarks.pretraining.runs import Run


@pytest.fixture(scope="module")
def group() -> Group:
    return made_up_group()


def test_rows_have_the_best_rate_the_mean_of_the_seeds_and_the_cost(group):
    lines = tables.arm_table(group)
    assert row_of(lines, "PreNorm")[2:6] == ["0.004", "2.294", "3", ""]
    block = row_of(lines, "Block AttnRes")
    assert block[5] == "PreNorm" and block[7] == "1.50"
    assert block[6].startswith("-0.1") and "±" in block[6]
    # PreNorm gains 0.06 nats from 1000 to 1500 bytes.
    assert block[8].startswith("-0.04")
    # Continued models have no baseline that was trained for longer; the made-up curves fall linearly from 5 nats.
    (moda,) = [line for line in tables.arm_table(group, is_continued=True) if "MoDA" in line]
    assert "| +1.4" in moda and moda.endswith("(mid-run) |")


def test_an_arm_that_diverges_is_in_the_table_without_a_difference(group):
    lines = tables.arm_table(group)
    assert row_of(lines, "Post-norm")[3] == "diverged"
    assert row_of(lines, "MoDA with post-norm")[5:7] == ["Post-norm", "-"]


def test_sentences_name_what_is_better_worse_and_undecided(group):
    said = {line.split("**")[1]: line for line in tables.arm_sentences(group)}
    assert "better by 0.1" in said["Block AttnRes"]
    assert "worse by 0.190" in said["Block AttnRes with static weights"]
    assert "not decided" in said["MoDA"]
    assert "diverged" in said["MoDA with post-norm"]


def test_a_group_without_the_reference_is_measured_by_the_better_baseline():
    names = ("prenorm_scaled", "block_attn_res")
    (group,) = groups({run: result for run, result in made_up_results().items() if run.arm in names})
    assert group.reference == "prenorm_scaled"
    lines = tables.arm_table(group)
    assert "difference to scaled PreNorm" not in lines[0]
    assert row_of(lines, "scaled PreNorm")[5:8] == ["", "", "1.00"]
    assert row_of(lines, "Block AttnRes")[5] == "scaled PreNorm"
    assert row_of(lines, "Block AttnRes")[6].startswith("+0.2")
    assert tables.best_rates(group)[0].endswith("with the rate of scaled PreNorm (0.004) |")


def test_every_arm_from_scratch_is_compared_with_the_better_baseline_too(group):
    lines = tables.arm_table(group)
    assert row_of(lines, "scaled Block AttnRes")[9].startswith("-0.1")
    assert row_of(lines, "MoDA with post-norm")[9].startswith("+0.3")
    # What an unscaled arm loses against scaled PreNorm is an effect of the initial weights.
    assert row_of(lines, "Block AttnRes")[9] == row_of(lines, "PreNorm")[9] == row_of(lines, "scaled PreNorm")[9] == ""
    assert "scaled" not in tables.arm_table(group, is_continued=True)[0]


def test_continued_models_have_a_table_of_their_own(group):
    labels = [line.split("|")[1].strip() for line in tables.arm_table(group, is_continued=True)[2:]]
    assert labels == ["continued PreNorm", "retrofitted gated MoDA"]
    assert row_of(tables.arm_table(group, is_continued=True), labels[1])[2] == "0.004, depth x 3"
    assert not set(labels) & {line.split("|")[1].strip() for line in tables.arm_table(group)}


def test_every_rate_that_was_tried_is_shown_and_the_best_is_marked(group):
    tried = row_of(tables.rate_table(group), "PreNorm")[1]
    assert tried == "0.002: 2.234, 0.004: **2.184**, 0.008: 2.234"
    assert "diverged" in row_of(tables.rate_table(group), "Post-norm")[1]


def test_the_loss_with_the_rate_of_the_reference_is_beside_the_best_one(group):
    lines = tables.best_rates(group)
    assert lines[0].endswith("| with the rate of PreNorm (0.004) |")
    assert row_of(lines, "PreNorm")[1:] == ["0.004", "2.184", "2.184"]
    assert row_of(lines, "MoDA with post-norm")[3] == "not tried"


def test_other_depths_are_compared_with_the_baseline_of_the_same_depth(group):
    lines = tables.depth_table(group)
    assert lines[0] == "| arm | 8 layers | 16 layers |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["PreNorm", "MoDA"]
    assert row_of(lines, "MoDA")[1].startswith("2.3")


def test_without_other_depths_there_is_no_table():
    (group,) = groups(made_up_results())
    assert tables.depth_table(group) == []


def test_an_unfinished_sweep_has_no_row():
    results = {run: result for run, result in made_up_results().items() if run.arm == "prenorm"}
    run = Run("stdlib", 1000, "moda", 16, 2e-3)
    (group,) = groups({**results, run: made_up_result(run, 1.0)})
    assert [line.split("|")[1].strip() for line in tables.arm_table(group)[2:]] == ["PreNorm"]
    assert row_of(tables.rate_table(group), "MoDA")[1] == "0.002: **1.000**"
