"""The subcommand `depthattn export`."""

from __future__ import annotations

import argparse

from .options import Commands, add_command, add_folder_options, print_report
from .run_command import EXIT_OK


def add_export(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    from ..conversion.foreign_formats import EXPORT_FORMATS

    parser = add_command(
        commands,
        "export",
        _run_export,
        help="convert a checkpoint with AttnRes to the format of another project",
        description="Convert a checkpoint with AttnRes to the format of another project whose code computes the same. "
        "What the format cannot express is an error.",
    )
    parser.add_argument("source", metavar="MODEL", help="folder or Hub id of the checkpoint")
    parser.add_argument("output_dir", metavar="OUT", help="folder to create")
    parser.add_argument(
        "--format",
        required=True,
        choices=EXPORT_FORMATS,
        help="fla: model `transformer` of flash-linear-attention",
    )
    add_folder_options(parser)


def _run_export(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_conversion

    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.export_fla import export_fla

    report = export_fla(
        args.source,
        args.output_dir,
        overwrite=args.overwrite,
        revision=args.revision,
        copy_tokenizer_code=args.copy_tokenizer_code,
        progress=args.progress,
    )
    print_report(report, args)
    return EXIT_OK
