"""The subcommand `depthattn import`."""

from __future__ import annotations

import argparse

from .options import Commands, add_command, add_folder_options, add_missing_tokenizer, print_report
from .run_command import EXIT_OK


def add_import(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    from ..conversion.foreign_formats import AUTO, FORMATS

    parser = add_command(
        commands,
        "import",
        _run_import,
        help="convert a checkpoint of another project that was trained with AttnRes or MoDA",
        description="Convert a checkpoint of another project that was trained with AttnRes or MoDA to one of this "
        "package that computes the same. Every tensor and every field of its config is accounted for; what this "
        "package cannot express is an error.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the checkpoint")
    parser.add_argument("output_dir", metavar="OUT", help="folder to create")
    parser.add_argument(
        "--format",
        default=AUTO,
        help=f"format of SOURCE: {', '.join(FORMATS)} (default: auto, by its config and its tensors)",
    )
    add_missing_tokenizer(parser, "continue")
    add_folder_options(parser)


def _run_import(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_import

    check_import(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.import_checkpoint import import_checkpoint

    report = import_checkpoint(
        args.source,
        args.output_dir,
        format=args.format,
        overwrite=args.overwrite,
        revision=args.revision,
        require_tokenizer=not args.allow_missing_tokenizer,
        copy_tokenizer_code=args.copy_tokenizer_code,
        progress=args.progress,
    )
    print_report(report, args)
    return EXIT_OK
