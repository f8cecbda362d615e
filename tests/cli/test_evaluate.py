"""`depthattn eval`: what it prints, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from eval_commands import run_two_tasks


def test_report_as_json_is_all_that_is_printed(retrofitted_stories, command):
    # Perplexities: lm-eval announces its bootstrap on stdout and shows bars.
    names = "lambada_openai_local,wikitext2_local"
    code, printed, errors = command(
        retrofitted_stories, "--tasks", names, "--limit", 1, "--max-length", 1024, "--json"
    )
    assert (code, errors) == (0, [])
    report = json.loads(printed)
    assert report["results"]["lambada_openai_local"]["perplexity,none"] > 1
    assert Path(report["results_file"]).is_file()


def test_compare_prints_paired_differences(retrofitted_stories, depthattn_data, command):
    run_two_tasks(command, retrofitted_stories, "--out", "a")
    run_two_tasks(command, depthattn_data / "stories260K" / "hf", "--out", "b")
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


def test_perplexity_command(retrofitted_stories, depthattn_data, command):
    Path("story.txt").write_text("Once upon a time there was a little cat. She was very happy. " * 60)
    wikitext = Path("wiki.txt")
    wikitext.write_text((depthattn_data / "wikitext2" / "test.txt").read_text()[:3000])
    arguments = [retrofitted_stories, "--perplexity", "story.txt", f"wiki={wikitext}", "--window", 64, "--out", "ppl"]
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
    code, _, errors = command(retrofitted_stories, "--perplexity", "story.txt", "--out", "other")
    assert code == 0
    Path("tiny.txt").write_text("Too short.")
    code, _, errors = command(retrofitted_stories, "--perplexity", "tiny.txt")
    assert code == 2 and len(errors) == 1 and "less than one window of 512" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["M"], "one of the arguments --suite --tasks --perplexity --compare is required"),
        (["--suite", "moda"], "MODEL: is missing"),
        (["org/model", "--tasks", "copa_local", "--update-card"], "--update-card: org/model is not a local folder"),
        (["M", "--tasks", "copa_local", "--update-card", "--limit", "3"], "--update-card: not allowed with --limit"),
        (["--compare", "a", "b", "--update-card"], "--update-card: not allowed with --compare"),
        (["M", "--suite", "glue"], "--suite glue: must be one of attnres, moda, ppl, small"),
        (["nowhere/to/be found", "--suite", "moda", "--offline"], "nowhere/to/be found: no such folder"),
        (["M", "--tasks", "nothing_local"], "--tasks nothing_local: unknown"),
        (["M", "--tasks", ","], "--tasks ,: contains no name"),
        (["M", "--suite", "moda", "--offline", "--exclude", "XYZ"], "--exclude XYZ: not one of PIQA"),
        (["M", "--tasks", "copa_local", "--offline"], "--offline: only allowed with --suite"),
        (["M", "--tasks", "copa_local", "--exclude", "x"], "--exclude x: only allowed with --suite"),
        (["M", "--tasks", "copa_local", "--limit", "0"], "--limit 0: must be at least 1"),
        (["M", "--tasks", "copa_local", "--batch-size", "many"], "--batch-size many: must be at least 1, or auto"),
        (["M", "--tasks", "copa_local", "--dtype", "int4"], "--dtype int4: must be one of auto, float32"),
        (["M", "--tasks", "copa_local", "--peft", "nowhere"], "--peft nowhere: no such folder"),
        (["M", "--tasks", "arc_easy_local", "--max-length", "4"], "max_length=4: an answer has"),
        (["M", "--perplexity", "story.txt", "--peft", "nowhere"], "--peft nowhere: no such folder"),
        (["M", "--perplexity", "story.txt", "--limit", "5"], "--limit: only allowed with --suite and --tasks"),
        (["M", "--tasks", "copa_local", "--window", "5"], "--window: only allowed with --perplexity"),
        (["M", "--perplexity", "story.txt", "--window", "513"], "--window 513: exceeds the context length of 512"),
        (["M", "--perplexity", "missing.txt"], "missing.txt: No such file"),
        (
            ["M", "--perplexity", "story.txt", "--window", "8", "--stride", "9"],
            "--stride 9: must be at most the window",
        ),
        (["--compare", "nowhere", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_said_in_one_line(retrofitted_stories, command, arguments, message):
    Path("story.txt").write_text("Once upon a time there was a little cat.")
    code, _, errors = command(*[retrofitted_stories if argument == "M" else argument for argument in arguments])
    assert code == 2 and len(errors) == 1 and message in errors[0], errors


@pytest.mark.parametrize(
    ("arguments", "interrupted"),
    [
        (["--perplexity", "text.txt", "--window", "16"], "hf_depthattn.eval.perplexity_run.read_domains"),
        (["--tasks", "copa_local"], "hf_depthattn.eval.harness.run.load_tasks"),
    ],
    ids=["perplexity", "tasks"],
)
def test_after_an_interrupt_the_same_command_continues(command, monkeypatch, arguments, interrupted):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(interrupted, interrupt)
    code, printed, errors = command("model", *arguments)
    assert (code, printed) == (130, "")
    assert errors == ["depthattn: interrupted; the same command continues the run"]
