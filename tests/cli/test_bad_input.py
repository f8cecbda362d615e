"""Seeded bad input for all commands: exit code 0, 1 or 2; after 2, one line on stderr, and nothing written."""

import gc
import importlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_fuzz import SPOILERS, Outcome, make_workspace, run_in_fork, snapshot
from foreign_checkpoints import fla
from foreign_models import ForeignModel
from tiny_checkpoints import save_stock

from hf_depthattn.conversion.import_checkpoint import import_checkpoint
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

NUM_INPUTS, NUM_QUICK = 320, 60
#: What commands import when they run: each fork finds it there.
WARM = (
    "conversion.export_fla",
    "conversion.restore",
    "eval.verify.verify",
    "eval.perplexity_run",
    "eval.report.run",
    "eval.report.drawing",
)


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("templates")
    save_stock(folder / "stock")
    save_stock(folder / "sharded", max_shard_size="20KB")
    save_stock(folder / "moe", "qwen3_moe")
    retrofit(folder / "stock", folder / "depth", num_blocks=2, depth_kv="attention", copy=True)
    fla(folder / "foreign", ForeignModel(sublayers_per_block=2, num_layers=2))
    import_checkpoint(folder / "foreign", folder / "imported", progress=False)
    (folder / "text.txt").write_text(DEFAULT_TEXT[:400])
    (folder / "short.txt").write_text("a")
    for name in WARM:
        importlib.import_module(f"hf_depthattn.{name}")
    # Forks share what they do not write to.
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        # They come after everything that bad input can do, and take seconds.
        patch.setattr("hf_depthattn.eval.report.drawing.save_images", lambda *args: {})
        yield folder
    gc.unfreeze()


def run_seed(seed: int, templates: Path, folder: Path) -> tuple[list[str], Outcome, list[str]]:
    """Returns the command, what it did, and what is wrong with that."""
    rng = random.Random(seed)
    work = make_workspace(templates, folder / str(seed))
    arguments = SPOILERS[seed % len(SPOILERS)](rng, work)
    before = snapshot(work.folder)
    outcome = run_in_fork(arguments, work.folder)
    lines = outcome.err.splitlines()
    wrong = []
    if outcome.code not in (0, 1, 2) or "Traceback" in outcome.err:
        wrong.append("exit code")
    if outcome.code == 1 and arguments[0] != "verify":
        wrong.append("only verify finds differences")
    if outcome.code == 2:
        if len(lines) != 1 or not lines[0].startswith("depthattn: error: "):
            wrong.append("not one line")
        # The tokenizers library prints some warnings there.
        if [line for line in outcome.out.splitlines() if not line.startswith("Ignored unknown kwarg option")]:
            wrong.append("something on stdout")
        if snapshot(work.folder) != before:
            wrong.append(f"written: {sorted(set(snapshot(work.folder).items()) ^ set(before.items()))}")
    return arguments, outcome, wrong


def check(seeds: range, templates: Path, folder: Path) -> None:
    failures = []
    for seed in seeds:
        arguments, outcome, wrong = run_seed(seed, templates, folder)
        if wrong:
            failures.append(f"seed {seed}: {arguments}: {wrong}, exit code {outcome.code}\n{outcome.err[-2000:]}")
    assert not failures, f"{len(failures)} of {len(seeds)}\n" + "\n".join(failures)


def test_bad_input_is_one_line_and_exit_code_2(templates, tmp_path):
    check(range(NUM_QUICK), templates, tmp_path)


@pytest.mark.slow
def test_much_bad_input_is_one_line_and_exit_code_2(templates, tmp_path):
    check(range(NUM_QUICK, NUM_INPUTS), templates, tmp_path)


def test_the_fuzz_sees_a_traceback_and_a_file(templates, tmp_path, monkeypatch):
    """What it is there to find, it finds."""

    def fail(*args, **kwargs):
        Path("left_behind").write_text("")
        raise KeyError("bug")

    monkeypatch.setattr("hf_depthattn.conversion.retrofit.read_stock_source", fail)
    work = make_workspace(templates, tmp_path / "work")
    before = snapshot(work.folder)
    outcome = run_in_fork(["retrofit", "stock", "new"], work.folder)
    assert outcome.code == 70 and "KeyError" in outcome.err
    assert snapshot(work.folder) != before
