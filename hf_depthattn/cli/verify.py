"""The subcommand `depthattn verify`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command, add_model_code, add_revision, print_report
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
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to read (default: a built-in passage)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="tokens to generate greedily (default: 32)"
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="device of the models (default: cpu)")
    parser.add_argument(
        "--allow-missing-tokenizer",
        action="store_true",
        help="compare on fixed random tokens if SOURCE has no tokenizer (default: a missing tokenizer is an error, "
        "exit code 2)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the custom code of a tokenizer")
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
