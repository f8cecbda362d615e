"""`depthattn restore`."""

from __future__ import annotations

import argparse

from .options import Commands, add_command, add_output_options, print_report
from .run_command import EXIT_OK


def add_restore(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "restore",
        _run_restore,
        help="give the stock checkpoint back while the queries and gates are zero",
        description="Give the stock checkpoint back while the queries and gates are zero. "
        "Refused, naming the modules, when they have been trained.",
    )
    parser.add_argument("source", metavar="OUT", help="folder or Hub id of the retrofitted checkpoint")
    parser.add_argument("output_dir", metavar="HOST_DIR", help="folder to create")
    add_output_options(parser)


def _run_restore(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_conversion

    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.restore import restore

    report = restore(
        args.source,
        args.output_dir,
        overwrite=args.overwrite,
        revision=args.revision,
        copy=args.copy,
        copy_tokenizer_code=args.copy_tokenizer_code,
        progress=args.progress,
    )
    print_report(report, args)
    return EXIT_OK
