"""Responses are kept, so that an interrupted run continues."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("lm_eval")

from harness_runs import MAX_LENGTH, model_of, run

from hf_depthattn.eval.harness.evaluation import ModelSettings, build_model, evaluate
from hf_depthattn.eval.harness.journal import ResponseJournal
from hf_depthattn.eval.harness.tasks import load_tasks


def test_interrupted_run_continues(checkpoints, tmp_path, monkeypatch):
    settings = ModelSettings(pretrained=str(checkpoints["moda"]), batch_size=8, max_length=MAX_LENGTH)
    tasks = ["copa_local", "triviaqa_local"]
    path = tmp_path / "responses.jsonl"

    def start(names, limit, fail_after=None):
        journal = ResponseJournal(path)
        model = build_model(settings, journal, progress=False)
        calls = []
        for method in ("_model_call", "_model_generate"):
            call = getattr(model, method)

            def counted(*args, call=call, **kwargs):
                calls.append(None)
                if fail_after is not None and len(calls) > fail_after:
                    raise KeyboardInterrupt
                return call(*args, **kwargs)

            monkeypatch.setattr(model, method, counted)
        try:
            manager = load_tasks(None, names)
            return evaluate(model, manager, settings, limit=limit, gen_kwargs={"max_gen_toks": 4}), len(calls)
        finally:
            journal.close()

    with pytest.raises(KeyboardInterrupt):
        start(tasks, 10, fail_after=2)
    # What was answered is there, and half a line, as a killed process leaves it, is not read.
    num_before = len(path.read_text().splitlines())
    assert num_before == 16
    with path.open("a") as file:
        file.write('["abc", [-1.')
    results, num_calls = start(tasks, 10)
    assert len(path.read_text().splitlines()) == 30
    # The last 4 of 20 answers in one batch, 10 texts in two.
    assert num_calls == 3
    again, num_calls_again = start(tasks, 10)
    assert num_calls_again == 0
    fresh = run(model_of(checkpoints["moda"], batch_size=8), tasks, 10, gen_kwargs={"max_gen_toks": 4})
    for task in tasks:
        expected = [sample["resps"] for sample in fresh["samples"][task]]
        for other in (results, again):
            assert other["results"][task] == fresh["results"][task]
            assert [sample["resps"] for sample in other["samples"][task]] == expected

    rolling, num_calls = start(["wikitext2_local"], 1)
    rolling_again, num_calls_again = start(["wikitext2_local"], 1)
    assert (num_calls > 0, num_calls_again) == (True, 0)
    assert rolling["results"] == rolling_again["results"]


def test_sampled_texts_are_not_repeated(tmp_path):
    from types import SimpleNamespace

    from hf_depthattn.eval.harness.journal import answered

    journal = ResponseJournal(tmp_path / "responses.jsonl")
    greedy = SimpleNamespace(args=("a", {"do_sample": False}))
    sampled = SimpleNamespace(args=("a", {"do_sample": True}))
    for request in (greedy, sampled):
        journal.add_partial("generate_until", request.args, "old")
    asked = []
    got = answered(
        journal, "generate_until", lambda r: asked.extend(r) or ["new"] * len(r), [greedy, sampled, sampled]
    )
    journal.close()
    assert got == ["old", "new", "new"] and asked == [sampled, sampled]


def test_a_journal_keeps_what_json_has_no_numbers_for(tmp_path):
    journal = ResponseJournal(tmp_path / "responses.jsonl")
    responses = [(math.nan, False), (-math.inf, True), -1.5, math.nan, "text", "NaN"]
    for number, response in enumerate(responses):
        journal.add_partial("m", (number,), response)
    journal.close()
    for line in (tmp_path / "responses.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
    journal = ResponseJournal(tmp_path / "responses.jsonl")
    journal.close()
    assert [repr(journal.get("m", (number,))) for number in range(6)] == list(map(repr, responses))
