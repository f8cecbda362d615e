"""The subcommand `depthattn restore`."""

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
        help="convert a retrofitted checkpoint back to its host while depth parameters have no effect",
        description="Convert a retrofitted checkpoint back to the class of its host, while its depth parameters have "
        "their initial values, with which they have no effect. Other weights are kept as they are. It is an error if "
        "a depth parameter has been trained; the message names the modules.",
    )
    parser.add_argument("source", metavar="RETROFITTED", help="folder or Hub id of the retrofitted checkpoint")
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
