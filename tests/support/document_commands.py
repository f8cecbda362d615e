"""Check or run the commands of a block of shell code in a document."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from repository import ROOT

from hf_depthattn.cli.main import build_parser, main
from hf_depthattn.errors import UserError

#: Programs of other projects: what they are given is checked as far as it is ours, and their blocks are never run.
OTHER_PROGRAMS = {"accelerate", "git", "hf", "lm-eval", "tensorboard", "torchrun", "transformers", "trl", "vllm"}
#: Programs that install, or start what has tests of its own: checked, not run.
CHECKED_PROGRAMS = {"make", "pip"}
#: Script -> arguments that shorten a run in a test; the last of two equal options counts.
SHORTER = {
    "examples/pretrain.py": ("--steps=2", "--batch-size=2", "--block-size=32", "--vocab-size=300"),
    "examples/finetune_trainer.py": ("--steps=2",),
}


def commands_of(code: str) -> list[list[str]]:
    """Split shell code into the words of its commands, one per line.

    Args:
        code: lines with commands and comments; a backslash continues a line.
    """
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Check the programs, subcommands, options, targets, extras and scripts of a command without running it.

    Args:
        words: the command, and before it assignments of environment variables.

    Raises:
        AssertionError: if the program is unknown, or does not know what it is given.
    """
    program, *arguments = _without_assignments(words)
    if program == "depthattn":
        _check_options(build_parser().parse_args, "depthattn", arguments)
    elif program == "make":
        _check_targets(arguments)
    elif program == "pip":
        _check_extras(arguments)
    elif program == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None, f"no module {arguments[1]}"
    else:
        assert program == "python" or program in OTHER_PROGRAMS, f"unknown program {program!r}; see {__name__}"
        _check_script(arguments)


def check_mention(command: str) -> None:
    """Check a command in a sentence, which may lack arguments: its subcommand, options, target, module or script.

    Args:
        command: the text between backticks.

    Raises:
        AssertionError: if something of it does not exist.
    """
    program, *words = command.split()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if program == "make":
        _check_targets([word for word in words if not word.startswith(("PYTEST_ARGS", "-"))])
    elif program == "depthattn" and words and not words[0].startswith("-"):
        help_text = io.StringIO()
        with redirect_stdout(help_text), suppress(SystemExit, UserError):
            build_parser().parse_args([words[0], "--help"])
        assert help_text.getvalue(), f"depthattn has no subcommand {words[0]}"
        assert all(option in help_text.getvalue() for option in options), f"unknown option in {command}"
        is_on_hub = any(re.fullmatch(r"[\w.-]+/[\w.-]+", word) for word in words[1:2])
        assert not (is_on_hub and "--update-card" in options), f"{command}: only a local folder has a card to update"
    elif words[:1] == ["-m"]:
        assert find_spec(words[1]) is not None, f"no module {words[1]}"
    for word in words:
        assert not word.endswith(".py") or (ROOT / word).is_file(), f"no script {word}"


def run_command(words: list[str], folder: Path) -> None:
    """Run a command in a folder, or check it if it is one of `CHECKED_PROGRAMS`.

    Args:
        words: the command.
        folder: the working directory, which is also that of this process.

    Raises:
        AssertionError: if the command fails, or must not be run.
    """
    check_command(words)
    program, *arguments = _without_assignments(words)
    if program == "depthattn":
        assert main([*arguments, "--no-progress"]) == 0, f"depthattn {shlex.join(arguments)} failed; see its output"
    elif program == "python":
        variables = dict(word.split("=", 1) for word in words[: words.index(program)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *arguments, *SHORTER.get(arguments[0], ())]
        result = subprocess.run(
            command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout[-1000:]}{result.stderr[-3000:]}"
    else:
        assert program in CHECKED_PROGRAMS, f"{program} is not run by the tests: mark its block with a reason"


def _without_assignments(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


def _check_targets(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        known = rf"\b{name}\b" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(known, makefile, re.MULTILINE), f"the Makefile has no {name}"


def _check_extras(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for found in re.finditer(r"(?:hf-depthattn|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(found[1].split(",")) <= set(extras), f"{found[0]}: the extras are {', '.join(extras)}"


def _check_script(arguments: list[str]) -> None:
    """Check one of our scripts and its options; another program may start it."""
    place = next((i for i, word in enumerate(arguments) if word.endswith(".py")), None)
    if place is None:
        return
    script = ROOT / arguments[place]
    assert script.is_file(), f"no script {arguments[place]}"
    # Scripts in `examples/` import their neighbours.
    with patch.object(sys, "path", [str(script.parent), *sys.path]):
        parse = runpy.run_path(str(script), run_name="checked").get("parse_arguments")
    assert parse is not None or place + 1 == len(arguments), f"{arguments[place]} has no function parse_arguments"
    if parse is not None:
        with patch.object(sys, "argv", arguments[place:]):
            _check_options(lambda _: parse(), arguments[place], arguments[place + 1 :])


def _check_options(parse: Callable[[list[str]], object], name: str, arguments: list[str]) -> None:
    try:
        parse(arguments)
    except (SystemExit, UserError) as error:
        assert getattr(error, "code", None) == 0, f"{name} refuses {shlex.join(arguments)}: {error}"
