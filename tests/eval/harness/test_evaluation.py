"""lm-eval's tasks on a small checkpoint: every kind of task runs, and every local suite."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from harness_runs import LIKELIHOOD, LIMIT, MAX_LENGTH, model_of, responses, run

from hf_depthattn.eval.harness import suites
from hf_depthattn.eval.harness.evaluation import ModelSettings, evaluate
from hf_depthattn.eval.harness.model import DepthAttnLM
from hf_depthattn.eval.harness.tasks import load_tasks


def test_every_item_is_answered(stock_results):
    assert set(stock_results["results"]) == set(LIKELIHOOD)
    for task in LIKELIHOOD:
        assert stock_results["n-samples"][task]["effective"] == LIMIT
        assert 0 <= stock_results["results"][task]["acc,none"] <= 1
    num_answers = 2 * 20 + 4 * 20 + 2 * 20 + 2 * 20 + 2 * 20 + 4 * 20 + 20 + 4 * 20
    assert len(responses(stock_results)) == num_answers


def test_generation_and_rolling_tasks_run(checkpoints):
    model = model_of(checkpoints["both"], batch_size=4)
    names = ["triviaqa_local", "bbh_cot_fewshot_boolean_expressions_local", "wikitext2_local"]
    results = run(model, names, limit=2, gen_kwargs={"max_gen_toks": 4})
    assert results["results"]["triviaqa_local"]["exact_match,remove_whitespace"] == 0
    assert 1 < results["results"]["wikitext2_local"]["bits_per_byte,none"] < 8
    assert len(results["samples"]["bbh_cot_fewshot_boolean_expressions_local"]) == 2


def test_generated_answers_of_stock_and_retrofit_are_equal(checkpoints):
    answers = []
    for name in ("stock", "both"):
        results = run(
            model_of(checkpoints[name], batch_size=3), ["triviaqa_local"], 5, gen_kwargs={"max_gen_toks": 12}
        )
        answers.append([sample["resps"] for sample in results["samples"]["triviaqa_local"]])
    assert answers[0] == answers[1] and any(text for [[text]] in answers[0])


def test_too_long_generation_is_refused_before_anything_is_scored(checkpoints, monkeypatch):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=512)
    monkeypatch.setattr(model, "loglikelihood", lambda _: pytest.fail("log-likelihoods were scored"))
    names = ["copa_local", "bbh_cot_fewshot_boolean_expressions_local"]
    with pytest.raises(ValueError, match=r"max_length=512: 1024 tokens are to be generated .*--max-new-tokens"):
        run(model, names, limit=1)


@pytest.mark.slow
@pytest.mark.parametrize("suite", suites.SUITES)
def test_local_suite_runs(checkpoints, suite):
    """Everything in DEPTHATTN_DATA, 20 items each, generated answers of a few tokens."""
    # The prompts with many shots take minutes at 1024 tokens, and fill any context that this model has.
    model = model_of(checkpoints["both"], 512 if suite == "attnres" else MAX_LENGTH, batch_size=16)
    loaded = suites.load_suite(suite, local=True)
    settings = ModelSettings(pretrained="as given", batch_size=16)
    limit = LIMIT if suite != "ppl" else 2
    results = evaluate(model, load_tasks(loaded, []), settings, limit=limit, gen_kwargs={"max_gen_toks": 4})
    values = {**results["results"], **results.get("groups", {})}
    for row in loaded.benchmarks:
        assert isinstance(values[row.task][row.metric], float), row
