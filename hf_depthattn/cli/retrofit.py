"""The subcommand `depthattn retrofit`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ..depth_options import DEPTH_OPTIONS, DepthOption, option_default, option_type
from ..errors import UserError
from .options import (
    Commands,
    add_command,
    add_missing_tokenizer,
    add_model_code,
    add_output_options,
    print_report,
)
from .run_command import EXIT_OK

#: Options with a flag of their own.
_FLAGS = {name: option for name, option in DEPTH_OPTIONS.items() if option.metavar is not None}


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
    blocks = parser.add_mutually_exclusive_group()
    moda = parser.add_argument_group("Mixture-of-Depths Attention (MoDA), with any connection")
    for name, option in _FLAGS.items():
        if name in ("num_blocks", "sublayers_per_block"):
            _add_flag(blocks, name, option)
        else:
            _add_flag(moda if name == "depth_kv" or option.is_moda else parser, name, option)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"set another option ({', '.join(_varying())}); can be repeated",
    )
    add_missing_tokenizer(parser, "continue")
    add_model_code(parser)
    add_output_options(parser)


def _add_flag(parser: argparse._ActionsContainer, name: str, option: DepthOption) -> None:
    flag = f"--{name.replace('_', '-')}"
    # `retrofit` has other defaults than the config where the host must be reproduced.
    default = option_default(name) if option.exact is ... else option.exact
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(flag, type=option_type(name), metavar=option.metavar, help=option.help + shown)


def _run_retrofit(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_conversion

    options = {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None} | _assigned(args.set)
    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.retrofit import retrofit

    report = retrofit(
        args.source,
        args.output_dir,
        overwrite=args.overwrite,
        revision=args.revision,
        copy=args.copy,
        require_tokenizer=not args.allow_missing_tokenizer,
        copy_tokenizer_code=args.copy_tokenizer_code,
        ignore_model_code=args.ignore_model_code,
        progress=args.progress,
        **options,
    )
    print_report(report, args)
    return EXIT_OK


def _others() -> list[str]:
    return [name for name in DEPTH_OPTIONS if name not in _FLAGS]


def _varying() -> list[str]:
    """Return those of `_others` that have more than one value with which a retrofit reproduces the host."""
    return [name for name in _others() if DEPTH_OPTIONS[name].exact is ...]


def _assigned(assignments: Sequence[str]) -> dict[str, object]:
    allowed = _others()
    options: dict[str, object] = {}
    for name, value in map(_assignment, assignments):
        if name not in allowed:
            raise UserError(f"--set {name}: must be one of {', '.join(allowed)}.")
        if name in options:
            raise UserError(f"--set {name}: was given twice; give it once.")
        options[name] = value
    return options


def _assignment(assignment: str) -> tuple[str, object]:
    """Parse `key_norm=false` to `("key_norm", False)`; a value that is not JSON is a string."""
    name, equals, value = assignment.partition("=")
    if not equals:
        raise UserError(f"--set {assignment}: must be FIELD=VALUE.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
