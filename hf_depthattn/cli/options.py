"""Options that several commands share, and printing of their reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

#: The object to which parsers of subcommands are added.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing checkpoint, once the new one is complete"
    )
    parser.add_argument("--copy", action="store_true", help="copy the weights (default: hard links where possible)")
    parser.add_argument(
        "--copy-tokenizer-code",
        action="store_true",
        help="copy the code of a tokenizer with custom code (default: custom code is an error, exit code 2)",
    )
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add `--revision`."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def add_model_code(parser: argparse.ArgumentParser) -> None:
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
