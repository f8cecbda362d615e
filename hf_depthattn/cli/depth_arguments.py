"""Arguments for the options of depth attention, which `depthattn retrofit` and `examples/pretrain.py` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable

from ..depth_options import DEPTH_OPTIONS, DepthOption, option_default, option_type
from ..errors import UserError

#: Options with a flag of their own.
FLAGS = {name: option for name, option in DEPTH_OPTIONS.items() if option.metavar is not None}
#: Names of the options that are given as `--set NAME=VALUE`.
SET_ONLY = [name for name in DEPTH_OPTIONS if name not in FLAGS]


def add_depth_flags(parser: argparse.ArgumentParser, *, for_retrofit: bool = False) -> None:
    """Add `--connection`, `--num-blocks`, `--depth-kv` and the other flags of options.

    Args:
        parser: the parser.
        for_retrofit: show the defaults of `retrofit`, which differ from those of the config where the host must be
            reproduced.
    """
    blocks = parser.add_mutually_exclusive_group()
    moda = parser.add_argument_group("Mixture-of-Depths Attention (MoDA), with any connection")
    for name, option in FLAGS.items():
        if name in ("num_blocks", "sublayers_per_block"):
            _add_flag(blocks, name, option, for_retrofit)
        else:
            _add_flag(moda if name == "depth_kv" or option.is_moda else parser, name, option, for_retrofit)


def _add_flag(parser: argparse._ActionsContainer, name: str, option: DepthOption, for_retrofit: bool) -> None:
    flag = f"--{name.replace('_', '-')}"
    default = option.exact if for_retrofit and option.exact is not ... else option_default(name)
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(flag, type=option_type(name), metavar=option.metavar, help=option.help + shown)


def add_set(parser: argparse._ActionsContainer, help: str, flag: str = "--set") -> None:
    """Add `--set FIELD=VALUE`, which can be repeated."""
    parser.add_argument(flag, action="append", default=[], metavar="FIELD=VALUE", help=help)


def given_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return the options that were given by their flags."""
    return {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}


def assigned(
    assignments: Iterable[str],
    allowed: Iterable[str],
    flag: str = "--set",
    describe: Callable[[], str] | None = None,
) -> dict[str, object]:
    """Parse assignments such as `key_norm=false`; a value that is not JSON is a string.

    Args:
        assignments: the values of the flag.
        allowed: names of the allowed fields.
        flag: the flag, in messages.
        describe: what a field may be, in messages; by default the allowed names.

    Raises:
        UserError: if one is not `FIELD=VALUE`, or its field is not allowed or occurs twice.
    """
    allowed = list(allowed)
    values: dict[str, object] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"{flag} {assignment}: must be FIELD=VALUE.")
        if name not in allowed:
            raise UserError(f"{flag} {name}: must be {describe() if describe else 'one of ' + ', '.join(allowed)}.")
        if name in values:
            raise UserError(f"{flag} {name}: was given twice; give it once.")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = value
    return values
