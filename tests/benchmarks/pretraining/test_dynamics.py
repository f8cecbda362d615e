"""Metrics of trained models: they belong to the trained weights, and are measured once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pretraining_study import TINY, made_up_result

from benchmarks.pretraining import corpora, dynamics, training
from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.results import read_dynamics
from benchmarks.pretraining.runs import Run

RUN = Run("tiny", 60, "block_attn_res_moda", 4, 1e-2)
CORPUS = corpora.Corpus(*(torch.arange(n, dtype=torch.int64).remainder(97).to(torch.uint8) for n in (200, 500)), "0")


@pytest.mark.parametrize("arm", ["postnorm", "block_attn_res", "moda", "block_attn_res_moda", "static_mix"])
def test_models_with_reads_or_slots_have_their_numbers_too(arm):
    found = dynamics.measure(training.build_model(replace(RUN, arm=arm), TINY), CORPUS, TINY.sequence_length)
    fields = ARMS[arm].fields
    assert ("depth_weights" in found) == (fields["connection"] == "attn_res")
    assert ("slot_mass" in found) == ("depth_kv" in fields)
    assert len(found["sublayer_magnitudes"]) == 8 and len(found["layer_gradients"]) == 4
    assert all(value > 0 for value in found["layer_gradients"])
    if "depth_weights" in found:
        # Untrained weights are uniform.
        assert found["depth_weights"]["entropy"] == pytest.approx(1, abs=1e-3)
        assert found["depth_weights"]["embedding"] == pytest.approx(found["depth_weights"]["newest"], abs=1e-3)


def test_the_command_measures_trained_weights_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dynamics, "read_corpus", lambda _: CORPUS)
    study, results = Study("tiny", 60, ("prenorm",), num_layers=2, num_seeds=1), {}
    while missing := Plan(study, {run: result.loss for run, result in results.items()}).missing():
        results[missing[0]] = made_up_result(missing[0], abs(missing[0].learning_rate - 4e-3))
    monkeypatch.setattr(dynamics, "read_results", lambda _: results)
    (best,) = Plan(study, {run: result.loss for run, result in results.items()}).seeds("prenorm")
    model = training.build_model(best, TINY)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(100)
    training.save_weights(model, training.weights_file(best, tmp_path / "models"))
    options = ["--tokens", "60", "--num-layers", "2", "--models", str(tmp_path / "models"), "--output", str(tmp_path)]
    monkeypatch.setitem(corpora.CORPORA, "tiny", None)
    command = ["--corpus", "tiny", *options]
    assert dynamics.main(command) == 0
    ((run, found),) = read_dynamics(tmp_path).items()
    assert run == best
    assert found["sublayer_magnitudes"][3] > 20 * found["sublayer_magnitudes"][1]
    assert capsys.readouterr().out.strip() == str(best.path)
    assert dynamics.main(command) == 0 and not capsys.readouterr().out
    assert json.loads((tmp_path / f"{best.path}.json").read_text())["versions"]["torch"] == torch.__version__
