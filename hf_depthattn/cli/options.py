"""Options that several commands share, and printing of their reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

from ..errors import UserError
from ..utils.argument_checks import AUTO, DTYPES

#: The object to which parsers of subcommands are added.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class Report(Protocol):
    """The report of a command; `str` formats it for printing."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str
) -> argparse.ArgumentParser:
    """Add a subcommand with the options that all subcommands share, and return its parser.

    Args:
        commands: the subcommands of `depthattn`.
        name: name of the subcommand.
        run: function of the parsed arguments that returns the exit code.
        help: one line for the list of subcommands.
        description: description in the help of the subcommand.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="Exit codes: 0 success, 1 verify found a difference, 2 user error (with a one-line message), 130 "
        "interrupted.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show progress on stderr (default: a bar on a terminal, a line every few seconds elsewhere)",
    )
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a checkpoint."""
    parser.add_argument("--copy", action="store_true", help="copy the weights (default: hard links where possible)")
    add_folder_options(parser)


def add_folder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a checkpoint, but for those of its weights."""
    add_overwrite(parser, "replace an existing checkpoint, once the new one is complete")
    parser.add_argument(
        "--copy-tokenizer-code",
        action="store_true",
        help="copy the code of a tokenizer with custom code (default: custom code is an error, exit code 2)",
    )
    add_revision(parser)


def add_overwrite(parser: argparse._ActionsContainer, help: str) -> None:
    """Add `--overwrite`; its help says what is lost."""
    parser.add_argument("--overwrite", action="store_true", help=help)


def add_revision(parser: argparse._ActionsContainer, of: str = "a Hub repository") -> None:
    """Add `--revision`."""
    parser.add_argument("--revision", help=f"branch, tag or commit of {of}")


def add_dtype(parser: argparse._ActionsContainer, default: str) -> None:
    """Add `--dtype`; `auto` is allowed if it is the default."""
    allowed = (AUTO, *DTYPES) if default == AUTO else DTYPES
    notes = {AUTO: "that of the checkpoint, default"} if default == AUTO else {default: "default"}
    names = [f"{name} ({notes[name]})" if name in notes else name for name in allowed]
    parser.add_argument("--dtype", default=default, help=f"{', '.join(names[:-1])} or {names[-1]}")


def add_device(parser: argparse._ActionsContainer, of: str = "the models", default: str | None = "cpu") -> None:
    """Add `--device`; without a default, a GPU is used if there is one."""
    shown = default or "cuda if available, otherwise cpu"
    parser.add_argument("--device", default=default, help=f"device of {of} (default: {shown})")


def add_batch_size(parser: argparse._ActionsContainer, of: str, default: int, *, auto: bool = False) -> None:
    """Add `--batch-size`.

    Args:
        parser: the parser or group.
        of: what is counted.
        default: its default.
        auto: whether `auto` is allowed; the value is then checked with the options of the command.
    """
    parser.add_argument(
        "--batch-size",
        metavar="B",
        type=_number_or_name if auto else int,
        default=default,
        help=f"{of} per forward pass{' or auto' if auto else ''} (default: {default})",
    )


def _number_or_name(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


def add_peft(parser: argparse._ActionsContainer, verb: str) -> None:
    """Add `--peft`; the verb says what is done with the adapter and MODEL."""
    parser.add_argument("--peft", metavar="ADAPTER", help=f"folder of a PEFT adapter to {verb} into MODEL")


def add_text(parser: argparse._ActionsContainer) -> None:
    """Add `--text`."""
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="UTF-8 text to read (default: a short built-in passage)"
    )


def add_remote_code(parser: argparse._ActionsContainer, of: str = "checkpoint") -> None:
    """Add `--trust-remote-code`."""
    parser.add_argument("--trust-remote-code", action="store_true", help=f"run the custom code of a {of}")


def add_missing_tokenizer(parser: argparse._ActionsContainer, instead: str) -> None:
    """Add `--allow-missing-tokenizer`; its help says what is done instead."""
    parser.add_argument(
        "--allow-missing-tokenizer",
        action="store_true",
        help=f"{instead} if SOURCE has no tokenizer (default: a missing tokenizer is an error, exit code 2)",
    )


def add_model_code(parser: argparse._ActionsContainer) -> None:
    """Add `--ignore-model-code`."""
    parser.add_argument(
        "--ignore-model-code",
        action="store_true",
        help="use transformers' class for a SOURCE with custom model code (default: custom code is an error, exit "
        "code 2)",
    )


def print_report(report: Report, args: argparse.Namespace) -> None:
    """Print a report as text, or as JSON with `--json`."""
    text = json.dumps(report.to_dict(), indent=2) if args.json else str(report)
    # A path may contain bytes that cannot be encoded; the report is printed all the same.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
