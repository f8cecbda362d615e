"""Checkpoints of a stand-in of the Hub as sources of commands, also in forms that have to be converted first."""

import json
from collections.abc import Iterator
from pathlib import Path

import foreign_checkpoints
import pytest
from foreign_models import ForeignModel
from imports_of_checkpoints import logits_in_float64
from local_hub import Repository, StoredFile, local_hub
from model_checks import relative_max_error
from processes import run_python
from repository import ROOT
from tiny_checkpoints import save_tokenizer

MODEL = ForeignModel(sublayers_per_block=4)
CONFIG = b'{"model_type": "llama"}'
# Repository -> files by path.
REPOSITORIES = {
    "distributed": {
        "config.json": CONFIG,
        "model_and_optim/.metadata": b"pickle",
        "model_and_optim/__0_0.distcp": b"data",
    },
    "runs": {
        f"lr{rate}/{path}": CONFIG
        for rate in ("1e-3", "2e-3")
        for path in ("config.json", "model_and_optim/.metadata")
    },
    "pickle": {"config.json": CONFIG, "state_step005100.pt": b"pickle"},
    "empty": {"config.json": CONFIG},
}
# Arguments -> what the message says
REFUSED = {
    ("import", "user/distributed"): [
        "user/distributed: is a distributed checkpoint",
        "hf download user/distributed --local-dir FOLDER",
        "unshard_checkpoint('FOLDER/model_and_optim', NEW_FOLDER, use_safetensors=True)",
    ],
    ("import", "user/runs"): [
        "user/runs: has no config.json, but folders in it have one (lr1e-3, lr2e-3)",
        "hf download user/runs --include 'lr1e-3/*' --local-dir FOLDER",
    ],
    ("import", "user/pickle"): ["user/pickle: has only a pickle (state_step005100.pt)", "docs/importing.md"],
    ("import", "user/empty"): ["user/empty: no model.safetensors"],
    ("retrofit", "user/distributed"): ["user/distributed: is a distributed checkpoint"],
    ("eval", "user/empty"): ["user/empty: no model.safetensors"],
    ("import", "user/nothing"): ["user/nothing: neither a local folder nor available on the Hub"],
}
_RUN = """
import contextlib, io, json, sys
from hf_depthattn.cli.main import main
for arguments in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(arguments)
    print(json.dumps([code, text.getvalue()]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> Iterator[tuple[Path, list]]:
    """Run all commands in one process; return its folder, and exit code and output of each command."""
    folder = tmp_path_factory.mktemp("sources")
    save_tokenizer(foreign_checkpoints.fla(folder / "fla", MODEL))
    files = {path.name: path.read_bytes() for path in (folder / "fla").iterdir()}
    commands = [["import", "user/fla", "imported", "--json"]]
    for command, repository in REFUSED:
        commands.append([command, repository, *(["--suite", "attnres"] if command == "eval" else ["out"])])
    with local_hub() as hub:
        for name, contents in {"fla": files, **REPOSITORIES}.items():
            hub.repositories[f"user/{name}"] = Repository()
            stored = {path: StoredFile(data, path.endswith(".safetensors")) for path, data in contents.items()}
            hub.repositories[f"user/{name}"].commit("main", stored)
            hub.objects |= {file.oid: file.content for file in stored.values() if file.is_large}
        environment = hub.environment(folder / "home")
        result = run_python("-c", _RUN, json.dumps(commands), cwd=folder, python_path=str(ROOT), **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "No files matched" not in result.stderr
    yield folder, [json.loads(line) for line in result.stdout.splitlines()]


def test_a_checkpoint_of_another_project_is_imported_by_its_id(answers):
    folder, ((code, report), *_) = answers
    assert code == 0 and json.loads(report)["source"] == "user/fla"
    assert relative_max_error(logits_in_float64(folder / "imported"), MODEL.logits()) <= 1e-12
    assert "user/fla" in (folder / "imported" / "README.md").read_text()


@pytest.mark.parametrize("number, words", list(enumerate(REFUSED.values(), 1)), ids=map(" ".join, REFUSED))
def test_what_must_be_converted_first_is_refused_with_the_command(number, words, answers):
    folder, outputs = answers
    code, message = outputs[number]
    assert code == 2 and message.count("\n") == 1, message
    assert all(word in message for word in words), message
    assert "snapshots" not in message and not (folder / "out").exists()
