"""The subcommand `depthattn retrofit`."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext

from ..depth_options import DEPTH_OPTIONS
from ..errors import UserError
from .depth_arguments import SET_ONLY, add_depth_flags, add_set, assigned, given_flags
from .options import (
    Commands,
    add_command,
    add_missing_tokenizer,
    add_model_code,
    add_output_options,
    print_report,
)
from .run_command import EXIT_OK, advice_after_interrupt


def add_retrofit(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "retrofit",
        _run_retrofit,
        help="convert a stock checkpoint to one with depth attention that computes the same logits",
        description="Convert a stock checkpoint to one with depth attention that computes the same logits. The "
        "weights are hard-linked, not copied. Without this package, OUT loads with trust_remote_code=True.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a checkpoint with safetensors weights")
    parser.add_argument("output_dir", metavar="OUT", help="folder to create")
    add_depth_flags(parser, for_retrofit=True)
    # Those with more than one value with which a retrofit reproduces the host.
    varying = [name for name in SET_ONLY if DEPTH_OPTIONS[name].exact is ...]
    add_set(parser, f"set another option ({', '.join(varying)}); can be repeated")
    add_missing_tokenizer(parser, "continue")
    add_model_code(parser)
    add_output_options(parser)
    parser.add_argument(
        "--push-to",
        metavar="REPO",
        help="upload OUT to this Hub repository (NAME or OWNER/NAME), which is created if necessary and whose weights "
        "are replaced; needs a token (`hf auth login`)",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="with --push-to, make a new repository private, and refuse one that is public",
    )


def _run_retrofit(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_conversion

    if args.private and args.push_to is None:
        raise UserError("--private: only allowed with --push-to.")
    options = given_flags(args) | assigned(args.set, SET_ONLY)
    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.retrofit import retrofit

    with _advice_on_upload(args):
        report = retrofit(
            args.source,
            args.output_dir,
            overwrite=args.overwrite,
            revision=args.revision,
            copy=args.copy,
            require_tokenizer=not args.allow_missing_tokenizer,
            copy_tokenizer_code=args.copy_tokenizer_code,
            ignore_model_code=args.ignore_model_code,
            push_to=args.push_to,
            private=args.private or None,
            progress=args.progress,
            **options,
        )
    print_report(report, args)
    return EXIT_OK


def _advice_on_upload(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Return a context in which an interrupt says how the upload is repeated, if there is one."""
    if args.push_to is None:
        return nullcontext()
    from ..conversion.upload import upload_command

    command = upload_command(args.output_dir, args.push_to, private=args.private)
    return advice_after_interrupt(f"if {args.output_dir} exists, it is complete and this uploads it: {command}")
