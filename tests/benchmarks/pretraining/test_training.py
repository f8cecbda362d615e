"""Training of one model: what arms share, what is measured, and that a run can be repeated."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from pretraining_study import TINY

from benchmarks.pretraining import corpora, training
from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.results import read_result
from benchmarks.pretraining.runs import Run, Setting
from hf_depthattn.integrations.trainer import is_depth_name

RUN = Run("tiny", 150, "block_attn_res", 4, 1e-2)
NOT_REPRODUCED = ("cpu_seconds", "wall_seconds", "heldout_curve")


@pytest.fixture(autouse=True)
def tiny_corpus(monkeypatch, tmp_path):
    files = [tmp_path / "train.txt", tmp_path / "heldout.txt"]
    for file, text in zip(files, ("abcd" * 50, "dcba" * 20), strict=True):
        file.write_text(text)
    monkeypatch.setitem(corpora.CORPORA, "tiny", lambda: (files[:1], files[1:]))
    corpora.read_corpus.cache_clear()
    yield
    corpora.read_corpus.cache_clear()


def carried_out(run: Run, folder) -> dict:
    training.carry_out(run, TINY, folder / "results", folder / "models")
    return json.loads(training.result_file(run, folder / "results").read_text())


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_of_a_seed_start_with_the_same_weights_of_the_host(arm):
    reference, model = (
        dict(training.build_model(replace(RUN, arm=name), TINY).named_parameters()) for name in ("prenorm", arm)
    )
    assert {name for name in model if not is_depth_name(name)} == reference.keys()
    scale = (2 * RUN.num_layers) ** -0.5 if ARMS[arm].has_scaled_outputs else 1.0
    for name, value in reference.items():
        own = scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(model[name], own * value, rtol=1e-6 if own != 1 else 0, atol=0)
    other = dict(training.build_model(replace(RUN, arm=arm, seed=1), TINY).named_parameters())
    assert not torch.equal(other["model.embed_tokens.weight"], model["model.embed_tokens.weight"])


def test_all_arms_of_a_seed_see_the_same_sequences(monkeypatch, tmp_path):
    seen: dict[str, list] = {}
    cut = training.windows
    for arm in ("prenorm", "moda"):
        monkeypatch.setattr(training, "windows", lambda *a, arm=arm: seen.setdefault(arm, []).append(a[1]) or cut(*a))
        carried_out(replace(RUN, arm=arm), tmp_path)
    assert len(seen["prenorm"]) > 6
    assert all(torch.equal(*pair) for pair in zip(seen["prenorm"], seen["moda"], strict=True))


def test_continued_models_see_other_sequences_than_before(monkeypatch, tmp_path):
    seen: list[torch.Tensor] = []
    cut = training.windows
    monkeypatch.setattr(training, "windows", lambda *a: seen.append(a[1]) or cut(*a))
    of_arm = {}
    carried_out(replace(RUN, arm="prenorm_scaled"), tmp_path)
    for arm in ("prenorm_scaled", "retrofit_control", "retrofit_moda"):
        seen.clear()
        start_rate = None if arm == "prenorm_scaled" else RUN.learning_rate
        carried_out(replace(RUN, arm=arm, start_rate=start_rate), tmp_path)
        of_arm[arm] = torch.cat(seen)
    assert torch.equal(of_arm["retrofit_control"], of_arm["retrofit_moda"])
    assert not torch.equal(of_arm["retrofit_control"], of_arm["prenorm_scaled"])


def test_a_held_out_loss_that_is_not_finite_is_divergence(monkeypatch, tmp_path):
    values = iter([5.0, math.nan])
    monkeypatch.setattr(training, "heldout_loss", lambda *_: next(values))
    content = carried_out(RUN, tmp_path)
    assert content["is_diverged"] and content["heldout_loss"] is None


def test_a_repeated_run_gives_the_same_losses(tmp_path):
    first, second = (carried_out(RUN, tmp_path / name) for name in "ab")
    for name in first:
        if name not in NOT_REPRODUCED:
            assert first[name] == second[name], name
    assert [(x, y) for x, _, y in first["heldout_curve"]] == [(x, y) for x, _, y in second["heldout_curve"]]
    assert carried_out(replace(RUN, seed=1), tmp_path)["heldout_loss"] != first["heldout_loss"]


def test_the_result_has_what_the_tables_need(tmp_path):
    content = carried_out(RUN, tmp_path)
    assert content["run"] == RUN.to_dict()
    # 150 bytes are 5.8 batches of 2 sequences of 13 bytes.
    assert content["tokens"] == 6 * 26 == content["heldout_curve"][-1][0]
    assert len(content["heldout_curve"]) == 3 == len(content["train_curve"])
    assert content["heldout_curve"][-1][2] == content["heldout_loss"] < content["heldout_curve"][0][2]
    assert content["heldout_curve"][-1][1] == content["cpu_seconds"] > 0
    model = training.build_model(RUN, TINY)
    assert content["parameters"] == model.num_parameters()
    assert content["depth_parameters"] == 2 * 9 * TINY.hidden_size
    assert content["versions"]["torch"] == torch.__version__
    assert read_result(training.result_file(RUN, tmp_path / "results")).run == RUN


def test_a_continued_model_starts_with_the_weights_of_its_start(tmp_path):
    start = replace(RUN, arm="prenorm_scaled")
    trained = carried_out(start, tmp_path)
    for arm in ("retrofit_control", "retrofit_both"):
        content = carried_out(replace(RUN, arm=arm, start_rate=RUN.learning_rate), tmp_path)
        assert content["heldout_curve"][0][2] == pytest.approx(trained["heldout_loss"], abs=2e-5)


def test_a_start_without_kept_weights_is_trained_again(tmp_path):
    start, run = replace(RUN, arm="prenorm_scaled"), replace(RUN, arm="retrofit_moda", start_rate=RUN.learning_rate)
    carried_out(start, tmp_path)
    expected = carried_out(run, tmp_path)
    training.weights_file(start, tmp_path / "models").unlink()
    result = training.result_file(start, tmp_path / "results")
    written = result.stat().st_mtime_ns
    assert carried_out(run, tmp_path)["heldout_loss"] == expected["heldout_loss"]
    assert result.stat().st_mtime_ns == written
    assert sorted(path.name for path in (tmp_path / "models").rglob("*")) == sorted(
        ["tiny", "150", *(training.weights_file(each, tmp_path).name for each in (start, run))]
    )


def test_divergence_is_a_result_without_a_loss(tmp_path):
    content = carried_out(replace(RUN, arm="postnorm", learning_rate=1e30), tmp_path)
    assert content["is_diverged"] and content["heldout_loss"] is None
    assert content["tokens"] < 6 * 26
    assert read_result(training.result_file(replace(RUN, arm="postnorm", learning_rate=1e30), tmp_path / "results"))
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_the_learning_rate_warms_up_and_falls_to_its_final_value():
    setting = Setting(warmup=0.1, final_rate=0.2)
    factors = [training.rate_factor(step, 100, setting) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("assignment", ["width=3", "hidden_size=wide", "hidden_size"])
def test_an_unknown_or_wrong_setting_is_refused(assignment):
    with pytest.raises(ValueError, match=assignment):
        Setting().with_values([assignment])
