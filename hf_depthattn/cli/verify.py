"""The subcommand `depthattn verify`."""

from __future__ import annotations

import argparse

from .options import (
    Commands,
    add_command,
    add_device,
    add_dtype,
    add_missing_tokenizer,
    add_model_code,
    add_remote_code,
    add_revision,
    add_text,
    print_report,
)
from .run_command import EXIT_DIFFERENT, EXIT_OK


def add_verify(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "verify",
        _run_verify,
        help="compare a retrofitted checkpoint with its source",
        description="Compare a retrofitted checkpoint with its source: logits, greedy generation and perplexity on a "
        "text. The checkpoints are loaded one after the other.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the stock checkpoint")
    parser.add_argument("retrofitted", metavar="RETROFITTED", help="folder of the retrofitted checkpoint")
    add_text(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="tokens to generate greedily (default: 32)"
    )
    add_dtype(parser, "float32")
    add_device(parser)
    add_missing_tokenizer(parser, "compare on fixed random tokens")
    add_remote_code(parser, of="tokenizer")
    add_model_code(parser)
    add_revision(parser)


def _run_verify(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_comparison
    from ..utils.paths import read_text

    text = None if args.text is None else read_text(args.text)
    check_comparison(args.source, args.retrofitted, revision=args.revision)
    from ..eval.verify.verify import verify

    report = verify(
        args.source,
        args.retrofitted,
        text=text,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        require_tokenizer=not args.allow_missing_tokenizer,
        trust_remote_code=args.trust_remote_code,
        ignore_model_code=args.ignore_model_code,
        progress=args.progress,
    )
    print_report(report, args)
    return EXIT_OK if report.ok else EXIT_DIFFERENT
