"""Options that several commands have, and how a command prints its report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

#: What the parser of a subcommand is added to.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Report(Protocol):
    """What a command prints."""

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary for JSON."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str
) -> argparse.ArgumentParser:
    """Add a subcommand with the options that all have, and return its parser.

    Args:
        commands: where to.
        name: of the subcommand.
        run: takes the parsed arguments, and returns the exit code.
        help: a line for the list of commands.
        description: what it does, for its own help.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="Exit codes: 0 done, 1 verify found a difference, 2 something to put right (said in one line), 130 "
        "interrupted.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress on stderr: a bar on a terminal, a line every few seconds elsewhere (default)",
    )
    return parser


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a checkpoint."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing checkpoint when the new one is complete"
    )
    parser.add_argument("--copy", action="store_true", help="copy the weights (default: hard links where possible)")
    parser.add_argument(
        "--copy-tokenizer-code",
        action="store_true",
        help="copy the code of a tokenizer that brings its own; without this it is an error (exit code 2)",
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
        help="take transformers' class for a SOURCE that brings its own model code; without this it is an error",
    )


def print_report(report: Report, args: argparse.Namespace) -> None:
    """Print a report as text, or as JSON with `--json`."""
    text = json.dumps(report.to_dict(), indent=2) if args.json else str(report)
    # A path may have bytes that are no text; the work is done, and its report is not lost for that.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
