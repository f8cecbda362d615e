"""The command `depthattn`.

Exit codes: 0 success; 1 `verify` found a difference; 2 user error, with a one-line message; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .evaluate import add_eval
from .export import add_export
from .import_checkpoint import add_import
from .options import Commands, Parser
from .report import add_report
from .restore import add_restore
from .retrofit import add_retrofit
from .run_command import run_command
from .select_slots import add_select_slots
from .set_advice import parse_with_advice
from .verify import add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code.
    """
    return run_command(lambda: _parse_and_run(argv))


def _parse_and_run(argv: Sequence[str] | None) -> int:
    from ..utils.quiet_libraries import quiet_libraries

    # A retrofit keeps the fields of its host.
    args = parse_with_advice(build_parser(), lambda args: (), argv)
    with quiet_libraries(args.progress):
        code: int = args.run(args)
        return code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser: argparse.ArgumentParser = Parser(
        prog="depthattn",
        description="Attention Residuals and Mixture-of-Depths Attention for transformers checkpoints.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"depthattn {__version__}")
    commands: Commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_retrofit, add_verify, add_restore, add_import, add_export, add_select_slots, add_eval, add_report):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
