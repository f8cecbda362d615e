"""`perplexity_run`: how a run continues, and what it does not overwrite."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_checkpoints import save_stock

from hf_depthattn.errors import UserError
from hf_depthattn.eval import perplexity_domains
from hf_depthattn.eval.perplexity_run import BATCH_SIZE, PerplexityOptions, run_perplexity

STORY = "The cat sat on the mat. It was a very long day, and nobody came by."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_stock(tmp_path_factory.mktemp("stock") / "llama"))


@pytest.fixture
def options(model, tmp_path, monkeypatch) -> PerplexityOptions:
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text(STORY)
    Path("code.txt").write_text("def add(a, b):\n    return a + b\n")
    return PerplexityOptions(model, ("story.txt", "code.txt"), window=16, stride=7, out=Path("new", "perplexity.json"))


def test_an_interrupted_run_continues_with_the_next_domain(options, monkeypatch):
    run_perplexity(dataclasses.replace(options, sources=("story.txt",)))
    scored = []
    perplexity = perplexity_domains.perplexity
    monkeypatch.setattr(
        perplexity_domains, "perplexity", lambda *args, **more: scored.append(args[2]) or perplexity(*args, **more)
    )
    report = run_perplexity(options).report
    assert scored == [Path("code.txt").read_text()]
    assert json.loads(options.file.read_text()) == report.to_dict() and list(report.domains) == [
        "story.txt",
        "code.txt",
    ]
    assert run_perplexity(options).report == report and len(scored) == 1
    # Another text under the same name is measured.
    Path("story.txt").write_text(STORY[1:])
    assert run_perplexity(options).report != report and scored[1:] == [STORY[1:]]


def test_results_of_another_run_are_not_overwritten(options, tmp_path):
    run_perplexity(options)
    before = options.file.read_text()
    other = str(save_stock(tmp_path / "other"))
    for change, message in (
        ({"model": other}, rf"holds results with model {options.model}, not {other}; .*--overwrite"),
        ({"window": 8}, "holds results with window 16, not 8"),
        ({"sources": ("story.txt",)}, r"holds results of code.txt, which would be lost; .*--out"),
    ):
        with pytest.raises(UserError, match=message):
            run_perplexity(dataclasses.replace(options, **change))
    assert options.file.read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "--window 0: must be at least 1"),
        ({"batch_size": "many"}, "--batch-size many: must be at least 1, or auto"),
        ({"dtype": "float64"}, "--dtype float64: must be one of auto, float32"),
        ({"peft": "nowhere"}, "--peft nowhere: no such folder"),
    ],
)
def test_callers_from_python_get_the_errors_of_the_command(options, change, message):
    with pytest.raises(UserError, match=message):
        run_perplexity(dataclasses.replace(options, **change))


def test_an_automatic_batch_size_is_the_default(options):
    assert dataclasses.replace(options, batch_size="auto").windows_per_pass == BATCH_SIZE
    assert dataclasses.replace(options, batch_size=3).windows_per_pass == 3
