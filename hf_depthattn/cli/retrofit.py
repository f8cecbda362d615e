"""`depthattn retrofit`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ..checkpoints.config_fields import CONFIG_FIELDS
from ..depth_options import DEPTH_KV_FIELDS
from ..errors import UserError
from .options import Commands, add_command, add_model_code, add_output_options, print_report
from .run_command import EXIT_OK

_DEPTH_KV_OPTIONS = ("depth_kv", *DEPTH_KV_FIELDS)


def add_retrofit(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
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
    add_model_code(parser)
    add_output_options(parser)


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


def _run_retrofit(args: argparse.Namespace) -> int:
    from ..conversion.early_checks import check_conversion

    fields = _fields(args.set)
    check_conversion(args.source, args.output_dir, overwrite=args.overwrite, revision=args.revision)
    from ..conversion.retrofit import retrofit

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
    print_report(report, args)
    return EXIT_OK


def _fields(assignments: Sequence[str]) -> dict[str, object]:
    own_options = {"connection", "num_blocks", "sublayers_per_block", *_DEPTH_KV_OPTIONS}
    allowed = [name for name in CONFIG_FIELDS if name not in own_options]
    fields: dict[str, object] = {}
    for name, value in map(_field, assignments):
        if name not in allowed:
            raise UserError(f"--set {name}: not one of {', '.join(allowed)}.")
        if name in fields:
            raise UserError(f"--set {name}: given twice.")
        fields[name] = value
    return fields


def _field(assignment: str) -> tuple[str, object]:
    """`key_norm=false` -> `("key_norm", False)`; what is not JSON is a string."""
    name, equals, value = assignment.partition("=")
    if not equals:
        raise UserError(f"--set {assignment}: must be FIELD=VALUE.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
