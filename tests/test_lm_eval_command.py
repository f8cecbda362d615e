"""`depthattn eval`: what it writes and prints, and one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from repository import ROOT

pytest.importorskip("lm_eval")

from hf_depthattn import retrofit
from hf_depthattn.cli.main import main
from hf_depthattn.eval.harness.suites import load_suite
from hf_depthattn.eval.harness.table import _published_cells, suite_table
from hf_depthattn.eval.model_folder import fingerprint


@pytest.fixture(scope="module")
def retrofitted(depthattn_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrofitted") / "stories"
    retrofit(depthattn_data / "stories260K" / "hf", folder, num_blocks=4)
    return folder


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Run `depthattn eval` in an empty folder; returns exit code, stdout and the lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = main(["eval", *map(str, arguments), "--no-progress"])
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return run


def run_tasks(command, model, *more) -> tuple[int, str, list[str]]:
    return command(model, "--tasks", "copa_local,arc_easy_local", "--limit", 6, "--max-length", 1024, *more)


def test_a_run_writes_lm_evals_files_and_a_table(retrofitted, command):
    code, printed, errors = run_tasks(command, retrofitted)
    assert (code, errors) == (0, [])
    folder = Path("eval_results", "stories-copa_local+arc_easy_local-limit6")
    names = sorted(path.name.split("_2")[0] for path in folder.iterdir())
    assert names == ["results", "run.json", "samples_arc_easy_local", "samples_copa_local", "table.md"]
    assert (folder / "table.md").read_text() in printed
    assert "| copa_local | acc | 0 | 6 |" in printed and "Only the first 6 items" in printed
    (file,) = folder.glob("results_*.json")
    results = json.loads(file.read_text())
    # What tools that read lm-eval's files look for.
    for key in ("results", "configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version", "task_hashes"):
        assert key in results
    assert results["config"]["model"] == "depthattn" and results["model_name"] == str(retrofitted)
    # Given again, the command prints what is there.
    start = time.monotonic()
    assert run_tasks(command, retrofitted) == (0, printed, [])
    assert len(list(folder.glob("results_*.json"))) == 1 and time.monotonic() - start < 5


def test_report_as_json_is_all_that_is_printed(retrofitted, command):
    # Perplexities: lm-eval announces its bootstrap on stdout and shows bars.
    names = "lambada_openai_local,wikitext2_local"
    code, printed, errors = command(retrofitted, "--tasks", names, "--limit", 1, "--max-length", 1024, "--json")
    assert (code, errors) == (0, [])
    report = json.loads(printed)
    assert report["results"]["lambada_openai_local"]["perplexity,none"] > 1
    assert Path(report["results_file"]).is_file()


def test_results_name_the_hub_repository(retrofitted, command, monkeypatch):
    # Not the folder of the cache, which is another on every machine.
    from hf_depthattn.eval import model_folder

    monkeypatch.setattr(model_folder, "find_folder", lambda *_: (retrofitted, "owner/name"))
    code, printed, _ = command("owner/name", "--tasks", "copa_local", "--limit", 2, "--out", "run")
    assert code == 0 and printed.startswith("# owner/name\n")
    (file,) = Path("run").glob("results_*.json")
    assert json.loads(file.read_text())["model_name"] == "owner/name"
    # A Hub repository's folder is called by its commit.
    assert json.loads(Path("run", "run.json").read_text())["commit"] == retrofitted.name


def test_other_settings_do_not_mix_with_a_run(retrofitted, depthattn_data, command):
    assert run_tasks(command, retrofitted, "--out", "run")[0] == 0
    code, _, errors = command(retrofitted, "--tasks", "copa_local", "--limit", 6, "--out", "run")
    assert code == 2 and len(errors) == 1 and "run: holds a run with" in errors[0]
    stock = depthattn_data / "stories260K" / "hf"
    code, _, errors = run_tasks(command, stock, "--out", "run")
    assert code == 2 and f"with model {retrofitted}, not {stock}" in errors[0]
    assert run_tasks(command, stock, "--out", "run", "--overwrite")[0] == 0
    Path("foreign").mkdir()
    Path("foreign", "thesis.tex").write_text("x")
    for more in ([], ["--overwrite"]):
        code, _, errors = run_tasks(command, stock, "--out", "foreign", *more)
        assert code == 2 and "is not empty and holds no run" in errors[0]


def test_compare_prints_paired_differences(retrofitted, depthattn_data, command):
    run_tasks(command, retrofitted, "--out", "a")
    run_tasks(command, depthattn_data / "stories260K" / "hf", "--out", "b")
    code, printed, errors = command("--compare", "a", "b")
    assert (code, errors) == (0, [])
    rows = [line.split() for line in printed.splitlines() if "_local" in line]
    assert [row[:3] for row in rows] == [
        ["arc_easy_local", "acc,none", "6"],
        ["arc_easy_local", "acc_norm,none", "6"],
        ["copa_local", "acc,none", "6"],
    ]
    assert all(row[-2:] == ["+0.0000", "0.0000"] for row in rows)
    assert len(json.loads(command("--compare", "a", "b", "--json")[1])["rows"]) == 3


def test_perplexity_command(retrofitted, depthattn_data, command):
    Path("story.txt").write_text("Once upon a time there was a little cat. She was very happy. " * 60)
    wikitext = Path("wiki.txt")
    wikitext.write_text((depthattn_data / "wikitext2" / "test.txt").read_text()[:3000])
    arguments = [retrofitted, "--perplexity", "story.txt", f"wiki={wikitext}", "--window", 64, "--out", "ppl"]
    code, printed, errors = command(*arguments)
    assert (code, errors) == (0, [])
    report = json.loads(Path("ppl", "perplexity.json").read_text())
    assert list(report["domains"]) == ["story.txt", "wiki"]
    assert report["domains"]["story.txt"]["bits_per_byte"] < 1 < report["domains"]["wiki"]["bits_per_byte"]
    assert (report["settings"]["window"], report["settings"]["stride"]) == (64, 32)
    assert "mean of the domains" in printed and "window 64, stride 32, float32" in printed
    for domain in report["domains"].values():
        assert len(domain.pop("documents")) == 1
    assert json.loads(command(*arguments, "--json")[1]) == report
    code, _, errors = command(retrofitted, "--perplexity", "story.txt", "--out", "other")
    assert code == 0
    Path("tiny.txt").write_text("Too short.")
    code, _, errors = command(retrofitted, "--perplexity", "tiny.txt")
    assert code == 2 and len(errors) == 1 and "less than one window of 512" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M"], "one of the arguments --suite --tasks --perplexity --compare is required"),
        (["--suite", "moda"], "MODEL: is missing"),
        (["M", "--suite", "glue"], "--suite glue: must be one of attnres, moda, ppl, small"),
        (["nowhere/to/be found", "--suite", "moda", "--offline"], "nowhere/to/be found: no such folder"),
        (["M", "--tasks", "nothing_local"], "--tasks nothing_local: unknown"),
        (["M", "--tasks", ","], "--tasks ,: names nothing"),
        (["M", "--suite", "moda", "--offline", "--exclude", "XYZ"], "--exclude XYZ: not one of PIQA"),
        (["M", "--tasks", "copa_local", "--offline"], "--offline: only for --suite"),
        (["M", "--tasks", "copa_local", "--exclude", "x"], "--exclude x: only for --suite"),
        (["M", "--tasks", "copa_local", "--limit", "0"], "--limit 0: must be at least 1"),
        (["M", "--tasks", "copa_local", "--batch-size", "many"], "--batch-size many: must be at least 1, or auto"),
        (["M", "--tasks", "copa_local", "--dtype", "int4"], "--dtype int4: must be one of auto, float32"),
        (["M", "--tasks", "copa_local", "--peft", "nowhere"], "--peft nowhere: no such folder"),
        (["M", "--tasks", "arc_easy_local", "--max-length", "4"], "max_length=4: an answer has"),
        (["M", "--perplexity", "story.txt", "--peft", "nowhere"], "--peft nowhere: no such folder"),
        (["M", "--perplexity", "story.txt", "--limit", "5"], "--limit: only for --suite and --tasks"),
        (["M", "--tasks", "copa_local", "--window", "5"], "--window: only for --perplexity"),
        (["M", "--perplexity", "story.txt", "--window", "513"], "--window 513: more than the context of 512 tokens"),
        (["M", "--perplexity", "missing.txt"], "missing.txt: No such file"),
        (
            ["M", "--perplexity", "story.txt", "--window", "8", "--stride", "9"],
            "--stride 9: must be at most the window",
        ),
        (["--compare", "nowhere", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_said_in_one_line(retrofitted, command, arguments, message):
    Path("story.txt").write_text("Once upon a time there was a little cat.")
    code, _, errors = command(*[retrofitted if argument == "M" else argument for argument in arguments])
    assert code == 2 and len(errors) == 1 and message in errors[0], errors


def test_missing_data_are_said_in_one_line(retrofitted, command, monkeypatch):
    monkeypatch.setenv("DEPTHATTN_DATA", "nowhere")
    code, _, errors = command(retrofitted, "--suite", "moda", "--offline")
    assert code == 2 and len(errors) == 1 and "DEPTHATTN_DATA" in errors[0]
    assert not Path("eval_results").exists()


def test_checkpoint_without_a_model_is_said_in_one_line(command, depthattn_data):
    Path("broken").mkdir()
    Path("broken", "config.json").write_text('{"model_type": "llama"}')
    code, _, errors = command("broken", "--tasks", "copa_local", "--limit", 1)
    assert code == 2 and len(errors) == 1 and errors[0].startswith("depthattn: error: broken: no model.safetensors")


@pytest.mark.slow
def test_killed_run_continues(retrofitted, depthattn_data, tmp_path):
    arguments = ["eval", retrofitted, "--suite", "moda", "--offline", "--limit", "20", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "hf_depthattn.cli.main", *map(str, arguments)]
    environment = dict(os.environ, DEPTHATTN_DATA=str(depthattn_data), PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    responses = tmp_path / "run" / "responses.jsonl"
    while process.poll() is None and not (responses.exists() and responses.stat().st_size > 20_000):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    num_before = responses.read_text().count("\n")
    assert num_before > 0 and not list((tmp_path / "run").glob("results_*"))
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"continues: {num_before} responses are there already" in result.stderr
    assert "| MMLU | mmlu_continuation_local | acc | 0 | 1140 |" in result.stdout
    assert not responses.exists()


# --- parts ---


def test_table_sets_ours_beside_the_published_pair():
    suite = load_suite("attnres", local=True)
    leaves = ["mmlu_anatomy_local", "mmlu_virology_local"]
    results = {
        "model_name": "m",
        "results": {
            "triviaqa_local": {"exact_match,remove_whitespace": 0.25, "exact_match_stderr,remove_whitespace": 0.1}
        },
        "groups": {"mmlu_local": {"acc,none": 0.5, "acc_stderr,none": 0.0125}},
        "group_subtasks": {"mmlu_local": leaves},
        "n-shot": {"triviaqa_local": 5, **dict.fromkeys(leaves, 5)},
        "n-samples": {name: {"effective": 20} for name in ("triviaqa_local", *leaves)},
        "versions": {"mmlu_local": 2, "triviaqa_local": 3.0},
        "config": {"limit": None, "model_dtype": "torch.float32", "batch_size": 8},
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "max_length": 512,
    }
    text = suite_table(suite, results)
    assert "| MMLU | mmlu_local | acc | 5 | 40 | 50.00 | 1.25 | 73.5 | 74.6 |" in text
    assert (
        "| TriviaQA | triviaqa_local | exact_match (remove_whitespace) | 5 | 20 | 25.00 | 10.00 | 69.9 | 71.8 |"
        in text
    )
    assert "| CMath | none |  |  |  |  |  | 84.7 | 85.1 |" in text and "CMath, not run: " in text
    assert "lm_eval 0.4.13, transformers 5.23.0, torch " in text and "arXiv 2603.15031" in text
    assert "Only the first" not in text and "BBH |" not in text.split("not run")[0]
    text = suite_table(suite.without(["MMLU"]), results)
    assert "| MMLU | none |  |  |  |  |  | 73.5 | 74.6 |" in text and "MMLU, not run: left out (--exclude)" in text


def test_published_numbers_have_the_decimals_of_their_paper():
    pairs = json.loads((ROOT / "eval" / "harness" / "published_results.json").read_text())["moda"]["pairs"]
    assert _published_cells("OpenBookQA", pairs) == ["35.60", "37.20", "38.80", "41.60"]
    assert _published_cells("unknown", pairs) == ["-"] * 4


def test_fingerprint_follows_config_and_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"xy")
    seen = {first, second, fingerprint(tmp_path)}
    # A checkpoint's own code, and an adapter in the older format.
    for name in ("modeling_x.py", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"x")
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 5


@pytest.mark.slow
def test_nothing_is_written_into_site_packages(monkeypatch, tmp_path):
    # lm-eval reads the folder of its request cache once, when it is imported.
    code = """
from hf_depthattn.eval.harness.environment import prepare_environment
prepare_environment()
from lm_eval.caching import cache
assert "site-packages" not in cache.PATH, cache.PATH
"""
    environment = {name: value for name, value in os.environ.items() if name != "LM_HARNESS_CACHE_PATH"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
