"""The command `depthattn`.

Exit codes: 0 done; 1 `verify` found a difference; 2 something that the user can put right, said in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..depth_options import DEPTH_KV_FIELDS
from .checkpoint_files import ConversionError
from .command_errors import EXIT_DIFFERENT, EXIT_OK, run_command
from .config_fields import CONFIG_FIELDS

_DEPTH_KV_OPTIONS = ("depth_kv", *DEPTH_KV_FIELDS)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConversionError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code.
    """
    return run_command(lambda: _parse_and_run(argv))


def _parse_and_run(argv: Sequence[str] | None) -> int:
    from .quiet_libraries import quiet_libraries

    args = build_parser().parse_args(argv)
    with quiet_libraries(args.progress):
        return args.run(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    from ..eval.eval_command import add_eval
    from ..eval.report_command import add_report

    parser = _Parser(
        prog="depthattn",
        description="Attention Residuals and Mixture-of-Depths Attention for transformers checkpoints.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"depthattn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_retrofit, _add_verify, _add_restore, add_eval, add_report):
        add(commands)
    return parser


def _command(
    commands, name: str, run: Callable[[argparse.Namespace], int], help: str, more: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}. {more}",
        epilog="Exit codes: 0 done, 1 verify found a difference, 2 something to put right (said in one line).",
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


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing checkpoint when the new one is complete"
    )
    parser.add_argument("--copy", action="store_true", help="copy the weights (default: hard links where possible)")
    parser.add_argument(
        "--copy-tokenizer-code",
        action="store_true",
        help="copy the code of a tokenizer that brings its own; without this it is an error (exit code 2)",
    )
    _add_revision(parser)


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")


def _add_model_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-model-code",
        action="store_true",
        help="take transformers' class for a SOURCE that brings its own model code; without this it is an error",
    )


def _add_retrofit(commands) -> None:
    parser = _command(
        commands,
        "retrofit",
        _run_retrofit,
        "give a stock checkpoint depth attention without changing a logit",
        "The weights are linked, not copied; OUT loads with trust_remote_code=True where this package is absent.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a checkpoint with safetensors weights")
    parser.add_argument("output_dir", metavar="OUT", help="folder to create")
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument("--num-blocks", type=int, metavar="N", help="at most N blocks (default: 8)")
    blocks.add_argument(
        "--sublayers-per-block",
        type=int,
        metavar="S",
        help="S sublayers (two per layer) in a block; 1 is Full AttnRes",
    )
    parser.add_argument(
        "--connection",
        default="attn_res",
        help="attn_res (default), or residual: the host's own sums, for MoDA alone or for the control",
    )
    _add_depth_kv_options(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of DepthAttnConfig, e.g. query=input; repeatable",
    )
    parser.add_argument(
        "--allow-missing-tokenizer",
        action="store_true",
        help="go on when SOURCE has no tokenizer; without this it is an error (exit code 2)",
    )
    _add_model_code(parser)
    _add_output_options(parser)


def _add_depth_kv_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Mixture-of-Depths Attention (MoDA), with either connection")
    group.add_argument(
        "--depth-kv",
        metavar="WRITERS",
        help="sublayers whose keys and values later layers read for the same token: attention, or attention+mlp, "
        "which adds projections of the MLPs' inputs (default: no MoDA)",
    )
    group.add_argument("--depth-gate", metavar="GATE", help="head (default): one gate per head, zero at the start")
    group.add_argument(
        "--depth-key-rope", metavar="ROPE", help="same_position (default), or none: depth keys are not rotated"
    )
    group.add_argument(
        "--depth-key-norm", metavar="LAYER", help="writer (default) or reader: whose key norm, where the host has one"
    )
    group.add_argument("--num-depth-slots", type=int, metavar="N", help="read the N newest slots only (default: all)")


def _add_verify(commands) -> None:
    parser = _command(
        commands,
        "verify",
        _run_verify,
        "compare a retrofitted checkpoint with its source",
        "Logits, greedy text and perplexity on real text. The checkpoints are loaded one after the other.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of the stock checkpoint")
    parser.add_argument("output_dir", metavar="OUT", help="the retrofitted checkpoint")
    parser.add_argument("--text", metavar="FILE", type=Path, help="UTF-8 text to read (default: a built-in passage)")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="length of the greedy text (32)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="where the models run (cpu)")
    parser.add_argument(
        "--allow-missing-tokenizer",
        action="store_true",
        help="when SOURCE has none, compare on fixed random tokens; without this it is an error (exit code 2)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for a tokenizer that brings its own code")
    _add_model_code(parser)
    _add_revision(parser)


def _add_restore(commands) -> None:
    parser = _command(
        commands,
        "restore",
        _run_restore,
        "give the stock checkpoint back while the queries and gates are zero",
        "Refused, naming the modules, when they have been trained.",
    )
    parser.add_argument("source", metavar="OUT", help="folder or Hub id of the retrofitted checkpoint")
    parser.add_argument("output_dir", metavar="HOST_DIR", help="folder to create")
    _add_output_options(parser)


# The implementations are imported when they run: `--help` and mistakes in arguments do not wait for torch, and an
# interrupt meets `run_command` wherever it comes.


def _run_retrofit(args: argparse.Namespace) -> int:
    from .early_checks import check_conversion

    fields = _fields(args.set)
    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from .retrofit import retrofit

    report = retrofit(
        args.source,
        args.output_dir,
        connection=args.connection,
        num_blocks=args.num_blocks,
        sublayers_per_block=args.sublayers_per_block,
        overwrite=args.overwrite,
        revision=args.revision,
        copy=args.copy,
        require_tokenizer=not args.allow_missing_tokenizer,
        copy_tokenizer_code=args.copy_tokenizer_code,
        ignore_model_code=args.ignore_model_code,
        progress=args.progress,
        **{name: getattr(args, name) for name in _DEPTH_KV_OPTIONS if getattr(args, name) is not None},
        **fields,
    )
    _print(report, args)
    return EXIT_OK


def _run_verify(args: argparse.Namespace) -> int:
    from .early_checks import check_comparison
    from .paths import read_text

    text = None if args.text is None else read_text(args.text)
    check_comparison(args.source, args.output_dir, revision=args.revision)
    from .verify import verify

    report = verify(
        args.source,
        args.output_dir,
        text=text,
        max_new_tokens=args.max_new_tokens,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        allow_missing_tokenizer=args.allow_missing_tokenizer,
        trust_remote_code=args.trust_remote_code,
        ignore_model_code=args.ignore_model_code,
        progress=args.progress,
    )
    _print(report, args)
    return EXIT_OK if report.ok else EXIT_DIFFERENT


def _run_restore(args: argparse.Namespace) -> int:
    from .early_checks import check_conversion

    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from .restore import restore

    report = restore(
        args.source,
        args.output_dir,
        overwrite=args.overwrite,
        revision=args.revision,
        copy=args.copy,
        copy_tokenizer_code=args.copy_tokenizer_code,
        progress=args.progress,
    )
    _print(report, args)
    return EXIT_OK


def _print(report, args: argparse.Namespace) -> None:
    text = json.dumps(report.to_dict(), indent=2) if args.json else str(report)
    # A path may have bytes that are no text; the work is done, and its report is not lost for that.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _fields(assignments: Sequence[str]) -> dict[str, object]:
    own_options = {"connection", "num_blocks", "sublayers_per_block", *_DEPTH_KV_OPTIONS}
    allowed = [name for name in CONFIG_FIELDS if name not in own_options]
    fields: dict[str, object] = {}
    for name, value in map(_field, assignments):
        if name not in allowed:
            raise ConversionError(f"--set {name}: not one of {', '.join(allowed)}.")
        if name in fields:
            raise ConversionError(f"--set {name}: given twice.")
        fields[name] = value
    return fields


def _field(assignment: str) -> tuple[str, object]:
    """`key_norm=false` -> `("key_norm", False)`; what is not JSON is a string."""
    name, equals, value = assignment.partition("=")
    if not equals:
        raise ConversionError(f"--set {assignment}: must be FIELD=VALUE.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
