"""The table of how trained models use their depth, on made-up metrics."""

from __future__ import annotations

import pytest
from pretraining_study import made_up_result

from benchmarks.pretraining.dynamics_table import dynamics_sentences, dynamics_table, growth
from benchmarks.pretraining.group import Group
from benchmarks.pretraining.plan import Plan, Study


@pytest.fixture(scope="module")
def group() -> Group:
    study, results = (
        Study("stdlib", 1000, ("prenorm", "block_attn_res", "moda", "prenorm_scaled", "dense_former"), num_seeds=2),
        {},
    )
    while missing := Plan(study, {run: result.loss for run, result in results.items()}).missing():
        results[missing[0]] = made_up_result(missing[0], abs(missing[0].learning_rate - 4e-3))
    return Group("stdlib", 1000, 16, results)


def metrics(last: float, **more) -> dict:
    return {
        # The first state is the embedding, which does not count.
        "state_magnitudes": [100.0, 1.0, 1.0, 1.0, 2 * last],
        "sublayer_magnitudes": [1.0, 1.0, 1.0, last],
        "layer_gradients": [2.0, 1.0, 1.0, 0.5],
        "usefulness": 1.5,
        "causal_score": 0.25,
        **more,
    }


def test_growth_compares_the_last_quarter_with_the_first():
    assert growth([1.0, 3.0, 9.0, 9.0, 9.0, 9.0, 5.0, 11.0]) == 4.0
    assert growth([2.0, 5.0]) == 2.5


def test_rows_are_means_over_seeds_and_have_a_dash_where_a_metric_does_not_apply(group):
    weights = {"entropy": 0.9, "embedding": 0.2, "newest": 0.4}
    prenorm, block, moda = (group.plan.seeds(arm) for arm in ("prenorm", "block_attn_res", "moda"))
    dynamics = {
        prenorm[0]: metrics(4.0),
        prenorm[1]: metrics(6.0),
        block[0]: metrics(1.0, depth_weights=weights),
        moda[0]: metrics(2.0, slot_mass={"total": 0.3, "uniform": 0.2}),
    }
    rows = dynamics_table(group, dynamics)[2:]
    assert rows == [
        "| PreNorm | 10.00 | 5.00 | 4.00 | 50.0 | 0.25 | - | - | - | - |",
        "| Block AttnRes | 2.00 | 1.00 | 4.00 | 50.0 | 0.25 | 0.90 | 0.20 | 0.40 | - |",
        "| MoDA | 4.00 | 2.00 | 4.00 | 50.0 | 0.25 | - | - | - | 0.30 (0.20) |",
    ]


def test_sentences_compare_every_arm_with_the_baseline_of_like_initial_weights(group):
    last = {"prenorm": 5.0, "block_attn_res": 1.0, "moda": 6.0, "prenorm_scaled": 3.0, "dense_former": 0.25}
    dynamics = {group.plan.seeds(arm)[0]: metrics(value) for arm, value in last.items()}
    assert [line.split(": ", 1)[1] for line in dynamics_sentences(group, dynamics)] == [
        "6.00 in scaled PreNorm; closer to 1 in scaled DenseFormer (0.50).",
        "10.00 in PreNorm; closer to 1 in Block AttnRes (2.00); no closer in MoDA (12.00).",
        "4.00 in scaled PreNorm; no closer in scaled DenseFormer (4.00).",
        "4.00 in PreNorm; no closer in Block AttnRes (4.00), MoDA (4.00).",
    ]


def test_without_measured_models_there_is_no_table(group):
    assert dynamics_table(group, {}) == dynamics_sentences(group, {}) == []
