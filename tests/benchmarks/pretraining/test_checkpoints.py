"""The committed trained models: made from weights and results of the study, with cards of their numbers."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from pretraining_study import TINY, made_up_result
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_depthattn  # noqa: F401  (registers the model type)
from benchmarks.pretraining import checkpoints, corpora, training
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.results import read_results
from benchmarks.pretraining.runs import Setting
from hf_depthattn.integrations.trainer import is_depth_name

BUDGET = 120


@pytest.fixture(scope="module")
def results() -> dict:
    """Made-up results of all arms, two seeds each, with two budgets."""
    study = Study("tiny", 60, tuple(checkpoints.NAMES), num_layers=4, num_seeds=2, budgets=(BUDGET,))
    study = Study(**{**study.__dict__, "budget_arms": study.arms})
    results = {}
    while missing := Plan(study, {run: result.loss for run, result in results.items()}).missing():
        run = missing[0]
        gain = 0.1 * (run.arm != "prenorm_scaled") + 0.01 * run.seed
        results[run] = made_up_result(run, 2 + abs(run.learning_rate - 4e-3) - gain)
    return results


@pytest.fixture
def made(results, tmp_path, monkeypatch):
    """Run the command; return the trained models by the names of their checkpoints."""
    monkeypatch.setattr(checkpoints, "read_results", lambda _: results)
    monkeypatch.setattr(checkpoints, "FOLDER", tmp_path / "trained")
    monkeypatch.setattr(checkpoints, "CARDS", tmp_path)
    monkeypatch.setitem(corpora.CORPORA, "tiny", None)
    trained = {}
    for run in results:
        if run.tokens == BUDGET and run.seed == 0:
            model = training.build_model(run, TINY)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            training.save_weights(model, training.weights_file(run, tmp_path / "models"))
            trained[checkpoints.NAMES[run.arm]] = model
    options = ["--tokens", str(BUDGET), "--rates-of", "60", "--num-layers", "4", "--models", str(tmp_path / "models")]
    assert checkpoints.main(["--corpus", "tiny", *options]) == 0
    return trained


def test_checkpoints_are_the_trained_models_in_bfloat16(made, tmp_path):
    for name, model in made.items():
        folder = tmp_path / "trained" / name
        assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "def é(x):\n\treturn  x\0"
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == list(text.encode()) and tokenizer.decode(ids[0]) == text
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
        saved = dict(loaded.named_parameters())
        for parameter_name, parameter in model.named_parameters():
            expected = parameter if is_depth_name(parameter_name) else parameter.to(torch.bfloat16).float()
            assert torch.equal(saved[parameter_name], expected), parameter_name


def test_cards_have_the_numbers_of_the_results(made, results, tmp_path):
    for arm, name in checkpoints.NAMES.items():
        (result,) = (r for run, r in results.items() if (run.arm, run.tokens, run.seed) == (arm, BUDGET, 0))
        card = ModelCard.load(tmp_path / f"stdlib-{name}.md")
        (entry,) = card.data.eval_results
        assert entry.metric_value == result.heldout_loss
        assert f"{result.loss:.3f} nats per byte" in card.text and "-0.100 ± 0.000" in card.text
        assert ("hf-depthattn" in card.data.tags) == (arm != "prenorm_scaled")
        assert card.content == (tmp_path / "trained" / name / "README.md").read_text()


def test_a_budget_that_was_not_trained_is_one_error(results, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "read_results", lambda _: results)
    monkeypatch.setitem(corpora.CORPORA, "tiny", None)
    assert checkpoints.main(["--corpus", "tiny", "--tokens", "7", "--rates-of", "60", "--num-layers", "4"]) == 1
    assert "was not trained on 0.007k bytes" in capsys.readouterr().err


def committed() -> dict:
    group = checkpoints.Group("stdlib", 100_000, 16, read_results())
    return checkpoints.results_of(group, checkpoints.COMMITTED_TOKENS)


def test_committed_cards_are_those_of_the_committed_results(tmp_path):
    trained = committed()
    for arm, name in checkpoints.NAMES.items():
        checkpoints.write_card(trained, arm, tmp_path / name)
        card = (tmp_path / name).read_text()
        assert (checkpoints.FOLDER / name / "README.md").read_text() == card
        assert (checkpoints.CARDS / f"stdlib-{name}.md").read_text() == card


@pytest.mark.parametrize("arm", checkpoints.NAMES)
def test_committed_checkpoints_have_the_loss_of_their_card(arm):
    result = committed()[arm][0]
    corpus = corpora.read_corpus("stdlib")
    if corpus.facts() != result.corpus:
        pytest.skip("another Python has another standard library")
    folder = checkpoints.FOLDER / checkpoints.NAMES[arm]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert training.heldout_loss(model, corpus, Setting(**result.setting)) == pytest.approx(result.loss, abs=5e-3)
