"""lm-eval on real items with a real small checkpoint, stock and retrofitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

pytest.importorskip("lm_eval")

import torch
from transformers import AutoModelForCausalLM

from hf_depthattn import retrofit
from hf_depthattn.eval.harness import suites
from hf_depthattn.eval.harness.evaluation import ModelSettings, build_model, evaluate
from hf_depthattn.eval.harness.journal import ResponseJournal
from hf_depthattn.eval.harness.model import DepthAttnLM
from hf_depthattn.eval.harness.task_files import tasks_folder
from hf_depthattn.eval.harness.tasks import load_tasks

LIMIT = 20
# stories260K has a context of 512 tokens, and an answer of PIQA is longer than that.
MAX_LENGTH = 1024

MULTIPLE_CHOICE = ["piqa_local", "openbookqa_local", "winogrande_local", "copa_local", "boolq_local", "arc_easy_local"]
LIKELIHOOD = [*MULTIPLE_CHOICE, "lambada_openai_local", "mmlu_abstract_algebra_local"]
RETROFITS = {
    "attn_res": {"num_blocks": 4},
    "moda": {"connection": "residual", "depth_kv": "attention+mlp"},
    "both": {"num_blocks": 4, "depth_kv": "attention+mlp"},
}
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def checkpoints(depthattn_data, tmp_path_factory) -> dict[str, Path]:
    stock = depthattn_data / "stories260K" / "hf"
    folder = tmp_path_factory.mktemp("retrofits")
    for name, options in RETROFITS.items():
        retrofit(stock, folder / name, **options)
    return {"stock": stock, **{name: folder / name for name in RETROFITS}}


def model_of(checkpoint: Path, max_length: int = MAX_LENGTH, **options) -> DepthAttnLM:
    return DepthAttnLM(pretrained=str(checkpoint), device="cpu", max_length=max_length, **options)


def run(model, names, limit=LIMIT, **options) -> dict:
    settings = ModelSettings(pretrained="as given", batch_size=model.batch_size)
    return evaluate(model, load_tasks(None, names), settings, limit=limit, **options)


def responses(results: dict) -> dict[tuple, float]:
    """(task, item, which answer) -> log-likelihood."""
    return {
        (task, sample["doc_id"], i): answer[0][0]
        for task, samples in results["samples"].items()
        for sample in samples
        for i, answer in enumerate(sample["resps"])
    }


@pytest.fixture(scope="module")
def stock_results(checkpoints) -> dict:
    return run(model_of(checkpoints["stock"], batch_size=8), LIKELIHOOD)


def test_every_item_is_answered(stock_results):
    assert set(stock_results["results"]) == set(LIKELIHOOD)
    for task in LIKELIHOOD:
        assert stock_results["n-samples"][task]["effective"] == LIMIT
        assert 0 <= stock_results["results"][task]["acc,none"] <= 1
    num_answers = 2 * 20 + 4 * 20 + 2 * 20 + 2 * 20 + 2 * 20 + 4 * 20 + 20 + 4 * 20
    assert len(responses(stock_results)) == num_answers


@pytest.mark.parametrize("name", ["attn_res", "moda", pytest.param("both", marks=pytest.mark.slow)])
def test_retrofit_answers_every_item_like_the_stock_checkpoint(checkpoints, stock_results, name):
    results = run(model_of(checkpoints[name], batch_size=8), LIKELIHOOD)
    assert results["config"]["model_num_parameters"] > stock_results["config"]["model_num_parameters"]
    expected, got = responses(stock_results), responses(results)
    assert expected.keys() == got.keys()
    worst = max(abs(got[key] / expected[key] - 1) for key in expected)
    assert worst <= RELATIVE
    assert results["results"].keys() == stock_results["results"].keys()


@pytest.mark.parametrize("name", ["attn_res", "moda"])
def test_right_padded_batches_equal_single_requests(checkpoints, stock_results, name):
    # Trained values: with queries and gates of zero, depth attention could not read a wrong token. float64 leaves
    # nothing to rounding, which differs between batch sizes.
    model = model_of(checkpoints[name], batch_size=8, dtype="float64")
    torch.manual_seed(0)
    for parameter_name, parameter in model.model.named_parameters():
        if parameter_name.endswith((".query", ".gate")) or "depth" in parameter_name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    tasks = ["copa_local", "arc_easy_local"]
    batched = responses(run(model, tasks, limit=8))
    model.batch_size_per_gpu = 1
    single = responses(run(model, tasks, limit=8))
    assert max(abs(batched[key] / single[key] - 1) for key in single) <= 1e-12
    stock = responses(stock_results)
    assert max(abs(batched[key] / stock[key] - 1) for key in single) > 1e-3, "the change does not show"


def test_log_likelihoods_build_no_cache(checkpoints, monkeypatch):
    model = model_of(checkpoints["both"], batch_size=8)
    seen = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1])
    run(model, ["copa_local"], limit=2)
    assert seen and all(output.past_key_values is None for output in seen)


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


def test_answer_longer_than_the_context_is_refused(checkpoints):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=16)
    with pytest.raises(ValueError, match=r"max_length=16: an answer has \d+ tokens .*--max-length"):
        run(model, ["arc_easy_local"], limit=5)
    with pytest.raises(ValueError, match=r"max_length=16: 256 tokens are to be generated .*--max-length"):
        run(model, ["triviaqa_local"], limit=1)


def test_too_long_generation_is_refused_before_anything_is_scored(checkpoints, monkeypatch):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=512)
    monkeypatch.setattr(model, "loglikelihood", lambda _: pytest.fail("log-likelihoods were scored"))
    names = ["copa_local", "bbh_cot_fewshot_boolean_expressions_local"]
    with pytest.raises(ValueError, match=r"max_length=512: 1024 tokens are to be generated .*--max-new-tokens"):
        run(model, names, limit=1)


def test_truncated_prompts_are_counted(checkpoints, capsys):
    model = DepthAttnLM(pretrained=str(checkpoints["stock"]), device="cpu", max_length=128)
    run(model, ["boolq_local"], limit=3)
    # Two answers to each of three long passages.
    assert model.num_truncated_prompts == 6
    assert "warning: 6 prompts were longer than max_length=128 allows" in capsys.readouterr().err


def test_adapter_is_applied(checkpoints, stock_results, tmp_path):
    peft = pytest.importorskip("peft")
    from hf_depthattn import lora_config

    model = AutoModelForCausalLM.from_pretrained(checkpoints["both"])
    adapted = peft.get_peft_model(model, lora_config(model))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    results = run(model_of(checkpoints["both"], peft=str(tmp_path / "adapter"), batch_size=8), ["copa_local"])
    changed, stock = responses(results), responses(stock_results)
    assert max(abs(changed[key] / stock[key] - 1) for key in changed) > 1e-3


# --- interrupted runs ---


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


# --- the other ways in ---


def run_lm_eval(*command: str, cwd: Path, data: Path, code: str | None = None) -> str:
    environment = dict(os.environ, DEPTHATTN_DATA=str(data), PYTHONPATH=str(ROOT), LMEVAL_LOG_LEVEL="ERROR")
    start = [sys.executable, *(("-c", code) if code else ("-m", "hf_depthattn.lm_eval"))]
    result = subprocess.run([*start, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def accuracies(folder: Path) -> dict[str, float]:
    (file,) = folder.rglob("results_*.json")
    return {task: values["acc,none"] for task, values in json.loads(file.read_text())["results"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["depthattn", "hf"])
def test_entry_point_runs_lm_evals_command(checkpoints, stock_results, depthattn_data, tmp_path, model):
    out = tmp_path / "out"
    arguments = [
        "run",
        "--model",
        model,
        "--model_args",
        f"pretrained={checkpoints['both']}",
        f"max_length={MAX_LENGTH}",
    ]
    arguments += ["--tasks", "copa_local", "--limit", str(LIMIT), "--device", "cpu", "--output_path", str(out)]
    printed = run_lm_eval(*arguments, cwd=tmp_path, data=depthattn_data)
    assert "|copa_local|" in printed
    assert accuracies(out) == {"copa_local": stock_results["results"]["copa_local"]["acc,none"]}


@pytest.mark.slow
def test_plain_lm_eval_runs_an_exported_checkpoint(checkpoints, stock_results, depthattn_data, tmp_path):
    # The classes come from the checkpoint's own files: nothing imports this package before the model is built.
    code = """
import sys
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
assert not any(name.startswith("hf_depthattn.modeling") for name in sys.modules)
"""
    out = tmp_path / "out"
    arguments = [
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoints['both']}",
        f"max_length={MAX_LENGTH}",
    ]
    arguments += ["--trust_remote_code", "--tasks", "copa_local", "--limit", str(LIMIT), "--device", "cpu"]
    arguments += ["--include_path", str(tasks_folder()), "--output_path", str(out)]
    run_lm_eval(*arguments, cwd=tmp_path, data=depthattn_data, code=code)
    assert accuracies(out) == {"copa_local": stock_results["results"]["copa_local"]["acc,none"]}


def test_include_path_is_printed_for_a_plain_lm_eval(monkeypatch, capsys):
    from hf_depthattn.eval.harness import cli

    monkeypatch.setattr(sys, "argv", ["hf_depthattn.lm_eval", "include-path"])
    cli.main()
    assert capsys.readouterr().out == f"{tasks_folder()}\n"


def test_include_path_is_given_where_lm_eval_takes_one():
    from hf_depthattn.eval.harness.cli import with_include_path

    ours = ["--include_path", str(tasks_folder())]
    for arguments in (["run", "--tasks", "x"], ["ls", "tasks"], ["--model", "hf", "--tasks", "x"]):
        assert with_include_path(arguments) == [*arguments, *ours]
    for arguments in ([], ["run"], ["ls", "--help"], ["run", "--include_path", "mine"], ["ls", "--include_path=mine"]):
        assert with_include_path(arguments) == arguments


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
