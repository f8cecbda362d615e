"""The folder of a run of tasks: complete files or none, also when the disk is full."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from damaged_checkpoints import edit_tensors
from full_disk import FullDisk, fill_disk

from hf_depthattn.errors import UserError
from hf_depthattn.utils.result_files import write_text

TASKS = ("--tasks", "copa_local,arc_easy_local", "--limit", 6, "--out", "run")


@pytest.fixture
def stories(depthattn_data) -> Path:
    return depthattn_data / "stories260K" / "hf"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_run_without_room_for_its_results_is_kept_and_continues(command, stories, monkeypatch, share):
    from lm_eval.loggers import evaluation_tracker

    assert command(stories, *TASKS[:-1], "complete")[0] == 0
    total = sum(file.stat().st_size for file in Path("complete").glob("samples_*"))
    with monkeypatch.context() as patched:
        # lm-eval only logs what it could not write.
        patched.setattr(evaluation_tracker, "open", FullDisk(int(share * total)).open, raising=False)
        code, out, errors = command(stories, *TASKS)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert "run: the results could not be written" in errors[0] and "the same command continues" in errors[0]
    assert sorted(file.name for file in Path("run").iterdir()) == ["responses.jsonl", "run.json"]
    num_responses = len(Path("run", "responses.jsonl").read_text().splitlines())
    code, _, errors = command(stories, *TASKS)
    assert code == 0 and errors == [f"resuming: {num_responses} responses are stored already"]
    for file in Path("run").glob("samples_*.jsonl"):
        assert [json.loads(line)["doc_id"] for line in file.read_text().splitlines()] == list(range(6))
    assert not Path("run", "responses.jsonl").exists()


def test_a_run_without_room_for_its_last_file_leaves_no_samples(command, stories, monkeypatch):
    from hf_depthattn.eval.harness import task_folder

    def write(path: Path, text: str) -> None:
        if path.name.startswith("results_"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_text(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(task_folder, "write_text", write)
        code, _, errors = command(stories, *TASKS)
    assert code == 2 and len(errors) == 1 and "(No space left on device)" in errors[0]
    assert sorted(file.name for file in Path("run").iterdir()) == ["responses.jsonl", "run.json"]


def test_a_run_without_room_for_its_responses_continues(command, stories, monkeypatch):
    with monkeypatch.context() as patched:
        fill_disk(patched, 2000)
        code, out, errors = command(stories, *TASKS)
    assert (code, out, len(errors)) == (2, "", 1), errors
    assert errors[0] == "depthattn: error: run/responses.jsonl: No space left on device"
    code, _, errors = command(stories, *TASKS)
    assert code == 0 and errors[0].startswith("resuming: ")


def test_results_of_a_diverged_model_are_strict_json(command, stories, tmp_path):
    import shutil

    shutil.copytree(stories, "nan")
    edit_tensors(Path("nan"), lambda t: t["model.norm.weight"].fill_(math.nan))
    code, printed, errors = command("nan", "--tasks", "wikitext2_local,copa_local", "--limit", 2, "--out", "run")
    assert code == 0, errors
    assert len(list(Path("run").glob("*.json*"))) == 4
    texts = [file.read_text() for file in Path("run").glob("*.json")]
    texts += [line for file in Path("run").glob("*.jsonl") for line in file.read_text().splitlines()]
    for text in texts:
        json.loads(text, parse_constant=pytest.fail)
    code, printed, errors = command("--compare", "run", "run", "--json")
    assert code == 0 and "NaN" not in printed and json.loads(printed)["rows"], errors


@pytest.mark.parametrize("content", ['{"learning_rate": 1}', "[1]", "{"])
def test_a_foreign_run_json_is_not_cleared(command, stories, content):
    Path("run").mkdir()
    Path("run", "run.json").write_text(content)
    Path("run", "results_1.json").write_text("mine")
    for more in ((), ("--overwrite",)):
        code, _, errors = command(stories, *TASKS, *more)
        assert code == 2 and len(errors) == 1 and "(--out)" in errors[0]
    assert Path("run", "run.json").read_text() == content and Path("run", "results_1.json").read_text() == "mine"


def test_half_a_character_in_a_sample_costs_no_samples(tmp_path):
    from lm_eval.loggers import EvaluationTracker

    from hf_depthattn.eval.harness.task_folder import TaskFolder

    run = TaskFolder(tmp_path / "run", {"model_fingerprint": "x", "tasks": ["t"], "versions": {}}, overwrite=False)
    tracker = run.tracker()
    assert isinstance(tracker, EvaluationTracker)
    hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), "h")
    sample = {"doc_id": 0, "doc": {"a": "x\ud800"}, "target": "t", "resps": [["\udfff"]], "filtered_resps": ["y"]}
    samples = {"t": [{**sample, **hashes, "arguments": [("prompt \ud800", {"until": []})], "acc": math.nan}]}
    results = run.finish(tracker, {"configs": {"t": {}}, "results": {"t": {"acc": math.nan}}, "samples": samples})
    assert results["results"]["t"]["acc"] is None
    (file,) = (tmp_path / "run").glob("samples_t_*.jsonl")
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["doc"] == {"a": "x\ufffd"} and json.loads(line)["acc"] is None


def test_a_missing_sample_is_noticed(tmp_path, monkeypatch):
    from hf_depthattn.eval.harness.task_folder import TaskFolder

    run = TaskFolder(tmp_path / "run", {"model_fingerprint": "x", "tasks": ["t"], "versions": {}}, overwrite=False)
    run.responses.write_text("kept")
    tracker = run.tracker()
    monkeypatch.setattr(tracker, "save_results_samples", lambda **_: None)
    with pytest.raises(UserError, match=r"could not be written \(0 of 0 samples of t were written\)"):
        run.finish(tracker, {"configs": {"t": {}}, "results": {}, "samples": {"t": []}})
    assert run.responses.read_text() == "kept" and run.results_file() is None
