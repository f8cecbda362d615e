"""Tables and sentences of the study, on made-up results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pretraining_study import made_up_result

from benchmarks.pretraining import tables
from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.group import Group, groups
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.results import Results
from benchmarks.pretraining.runs import Run

#: Arm -> how far it is below the loss of PreNorm, and its CPU time.
MADE_UP = {
    "prenorm": (0.0, 10.0),
    "prenorm_scaled": (0.3, 10.0),
    "block_attn_res": (0.1, 15.0),
    "static_mix": (-0.2, 12.0),
    "moda": (0.001, 20.0),
    "postnorm": (None, 10.0),
    "moda_postnorm": (0.0, 20.0),
    "retrofit_control": (0.3, 10.0),
    "retrofit_moda": (0.35, 20.0),
}


def loss_of(run: Run) -> float | None:
    lower, _ = MADE_UP[run.arm]
    if lower is None:
        return None
    noise = 0.01 * (run.seed * (len(run.arm) % 5) % 3)
    off_best = 0.05 * (run.learning_rate != 4e-3)
    if len(ARMS[run.arm].depth_lr_factors) > 1:
        off_best += 0.05 * (run.depth_lr_factor != 3)
    return 2.0 + 0.1 * run.seed + noise + off_best - lower + 0.2 * (1000 / run.tokens) - 0.001 * run.num_layers


def made_up_results(loss: Callable[[Run], float | None] = loss_of, **more) -> Results:
    study = Study("stdlib", 1000, tuple(MADE_UP), **more)
    results: Results = {}
    while True:
        losses = {run: result.loss for run, result in results.items()}
        missing = Plan(study, losses).missing()
        if not missing:
            return results
        for run in missing:
            results[run] = made_up_result(run, loss(run), MADE_UP[run.arm][1] * run.tokens / 1000)


@pytest.fixture(scope="module")
def group() -> Group:
    results = made_up_results(
        depths=(8,), depth_arms=("prenorm", "moda"), budgets=(500, 2000), budget_arms=("prenorm", "block_attn_res")
    )
    (group,) = groups(results)
    return group


def row_of(lines: list[str], label: str) -> list[str]:
    (row,) = [line for line in lines if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_rows_have_the_best_rate_the_mean_of_the_seeds_and_the_cost(group):
    lines = tables.arm_table(group)
    assert row_of(lines, "PreNorm")[2:6] == ["0.004", "2.294", "3", ""]
    block = row_of(lines, "Block AttnRes")
    assert block[5] == "PreNorm" and block[7] == "1.50"
    assert block[6].startswith("-0.1") and "±" in block[6]
    # The curve falls linearly from 5 nats, so at two thirds of it the arm is far behind.
    assert block[8].startswith("+0.8")


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


def test_the_summary_names_every_arm_once_per_condition(group):
    tokens, time, to_scaled = tables.summary(group)
    assert tokens == (
        "- At equal tokens: better than the baseline: Block AttnRes, scaled PreNorm; worse: Block AttnRes with static "
        "weights; not decided: MoDA; not compared, as a run diverged: Post-norm, MoDA with post-norm (against "
        "Post-norm)."
    )
    assert "worse: Block AttnRes, MoDA" in time
    assert "worse: PreNorm, Block AttnRes" in to_scaled


def test_every_arm_from_scratch_is_compared_with_the_better_baseline_too(group):
    lines = tables.arm_table(group)
    assert row_of(lines, "Block AttnRes")[9].startswith("+0.2")
    assert row_of(lines, "PreNorm")[9].startswith("+0.3")
    assert row_of(lines, "scaled PreNorm")[9] == ""
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


def test_budgets_have_a_fit_and_the_budget_that_the_reference_needs(group):
    lines = tables.budget_table(group)
    assert lines[0].startswith("| arm | 0.5k bytes | 1k bytes | 2k bytes | fit |")
    reference, block = (row_of(lines, label) for label in ("PreNorm", "Block AttnRes"))
    assert "T^-" in reference[4] and reference[5] == ""
    assert [cell.strip() for cell in block[5].split(",")][-1] == "beyond the largest"
    assert block[5].split(",")[0].endswith(" x")


def test_the_reference_is_trained_longer_where_a_budget_covers_it(group):
    said = tables.equal_time_by_budget(group)
    assert any("Block AttnRes" in line and "1.50 times as many bytes" in line for line in said)


def test_without_other_depths_and_budgets_there_are_no_tables():
    (group,) = groups(made_up_results())
    assert tables.depth_table(group) == tables.budget_table(group) == tables.equal_time_by_budget(group) == []


def test_an_unfinished_sweep_has_no_row():
    results = {run: result for run, result in made_up_results().items() if run.arm == "prenorm"}
    run = Run("stdlib", 1000, "moda", 16, 2e-3)
    (group,) = groups({**results, run: made_up_result(run, 1.0)})
    assert [line.split("|")[1].strip() for line in tables.arm_table(group)[2:]] == ["PreNorm"]
    assert row_of(tables.rate_table(group), "MoDA")[1] == "0.002: **1.000**"
