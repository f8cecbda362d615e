"""Files of results: strict JSON, never over foreign files, complete or not there, also when the disk is full."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import edit_tensors
from eval_commands import strict_json
from full_disk import FullDisk, fill_disk
from safetensors.torch import load_file
from tiny_checkpoints import save_stock

from hf_depthattn.errors import UserError
from hf_depthattn.eval import perplexity_domains
from hf_depthattn.eval.harness.journal import ResponseJournal
from hf_depthattn.eval.perplexity import exp
from hf_depthattn.eval.perplexity_results import read_report
from hf_depthattn.utils import result_files
from hf_depthattn.utils.result_files import json_text, write_text

PERPLEXITY = ("--perplexity", "text.txt", "--window", 32, "--out", "out")


# --- values ---


def test_a_diverged_model_is_no_perplexity_of_infinity(command):
    edit_tensors(Path("model"), lambda t: t["model.norm.weight"].fill_(math.nan))
    code, printed, errors = command("model", *PERPLEXITY)
    assert (code, errors) == (0, [])
    assert "nan" in printed and "inf" not in printed.replace("infinite", "")
    assert "text.txt: the loss of 1 of 1 documents is NaN or infinite." in printed
    file = Path("out", "perplexity.json")
    domain = strict_json(file)["domains"]["text.txt"]
    assert [domain[name] for name in ("perplexity", "bits_per_byte", "loss_nats_per_token")] == [None] * 3
    assert domain["num_documents_without_loss"] == 1
    assert math.isnan(read_report(file)["mean"]["perplexity"])
    # Given again, the command prints what is there.
    assert command("model", *PERPLEXITY)[1] == printed
    code, printed, _ = command("model", *PERPLEXITY, "--json")
    assert json.loads(printed)["mean"]["perplexity"] is None and "NaN" not in printed


def test_a_large_loss_is_a_perplexity_of_infinity(command):
    edit_tensors(Path("model"), lambda t: t["lm_head.weight"].mul_(1e5))
    code, printed, _ = command("model", *PERPLEXITY)
    assert code == 0 and "inf" in printed and "documents is NaN" not in printed
    domain = strict_json(Path("out", "perplexity.json"))["domains"]["text.txt"]
    assert domain["perplexity"] is None and domain["loss_nats_per_token"] > 700
    assert exp(2.0) == math.exp(2.0) and exp(1e4) == math.inf and math.isnan(exp(math.nan))


def test_json_is_strict_and_can_be_encoded():
    value = {"a": [math.nan, -math.inf, 0.5], "b\ud800": ("x\udfff", "😀", None, True, 3)}
    text = json_text(value)
    assert json.loads(text) == {"a": [None, None, 0.5], "b\ufffd": ["x\ufffd", "😀", None, True, 3]}
    assert text.encode() and text.endswith("}\n")


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


# --- outputs that are not ours ---


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', "[1]", "not JSON", '{"settings": 3}', '{"settings": {}, "domains": {}}']
)
def test_perplexity_never_overwrites_a_foreign_file(command, content, more):
    for name in ("mine.json", "folder/perplexity.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
        out = "folder" if "folder" in name else name
        code, _, errors = command("model", *PERPLEXITY[:-1], out, *more)
        assert code == 2 and len(errors) == 1 and "choose another place (--out)" in errors[0]
        assert Path(name).read_text() == content


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_the_config_of_the_model_survives(command, more):
    before = Path("model", "config.json").read_bytes()
    code, _, errors = command("model", *PERPLEXITY[:-1], "model/config.json", *more)
    assert code == 2 and len(errors) == 1 and Path("model", "config.json").read_bytes() == before


def test_a_folder_called_like_the_file_is_refused_before_the_work(command, monkeypatch):
    Path("out.json").mkdir()
    monkeypatch.setattr(perplexity_domains, "evaluate_domains", lambda *a, **k: pytest.fail("the model was run"))
    code, _, errors = command("model", *PERPLEXITY[:-1], "out.json")
    assert code == 2 and "out.json: is a folder" in errors[0]


def test_overwrite_forgets_own_results_when_the_new_ones_are_there(command):
    assert command("model", *PERPLEXITY)[0] == 0
    file = Path("out", "perplexity.json")
    before = file.read_text()
    arguments = ["model", "--perplexity", "text.txt", "--window", 16, "--out", "out"]
    assert command(*arguments)[0] == 2 and file.read_text() == before
    Path("short.txt").write_text("short")
    # A mistake does not cost the results that are there.
    code, _, errors = command("model", "--perplexity", "short.txt", "--out", "out", "--overwrite")
    assert code == 2 and file.read_text() == before, errors
    assert command(*arguments, "--overwrite")[0] == 0
    assert strict_json(file)["settings"]["window"] == 16


# --- no room ---


@pytest.mark.parametrize("room", [0, 100])
def test_a_file_that_finds_no_room_leaves_the_old_one(tmp_path, monkeypatch, room):
    path = tmp_path / "file.json"
    write_text(path, "old")
    fill_disk(monkeypatch, room)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(path, "x" * 1000)
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(result_files.os, "fsync", lambda fd: done.append("fsync") or fsync(fd))
    monkeypatch.setattr(result_files.os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    write_text(tmp_path / "file", "text")
    # The file before its name, the folder after it.
    assert done == ["fsync", "replace", "fsync"]


def test_perplexity_without_room_is_one_line(command, monkeypatch):
    with monkeypatch.context() as patched:
        fill_disk(patched, 300)
        code, out, errors = command("model", *PERPLEXITY)
    assert (code, out, len(errors)) == (2, "", 1)
    assert errors[0] == "depthattn: error: out/perplexity.json: No space left on device"
    assert not list(Path("out").iterdir())
    assert command("model", *PERPLEXITY)[0] == 0


# --- runs of tasks ---

lm_eval = pytest.importorskip("lm_eval")

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
    assert code == 0 and errors == [f"continues: {num_responses} responses are there already"]
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
    assert code == 0 and errors[0].startswith("continues: ")


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
    with pytest.raises(UserError, match=r"could not be written \(0 of 0 samples of t are there\)"):
        run.finish(tracker, {"configs": {"t": {}}, "results": {}, "samples": {"t": []}})
    assert run.responses.read_text() == "kept" and run.results_file() is None


def test_the_weights_of_a_test_model_are_numbers(tmp_path):
    # Guards the tests above: the tiny model itself has not diverged.
    assert all(torch.isfinite(t).all() for t in load_file(save_stock(tmp_path / "m") / "model.safetensors").values())
