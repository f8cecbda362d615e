"""Options by their names on the command line: what to type instead of an unknown flag or of what a message names."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..depth_options import DEPTH_OPTIONS
from ..errors import UserError
from .depth_arguments import FLAGS

# `field=value` in messages: a quoted value, or a number or name that does not swallow the end of the sentence.
_ASSIGNMENT = re.compile(r"\b([a-z_]+)=('[^']*'|[-\w]+(?:\.\d+)?)")
_PYTHON_NAMES = {"True": True, "False": False, "None": None}


def parse_with_advice(
    parser: argparse.ArgumentParser,
    host_fields: Callable[[argparse.Namespace], Iterable[str]],
    words: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse a command line; where there is `--set`, an unknown flag with the name of a field is answered with it.

    Args:
        parser: the parser; options of depth attention are set with `add_depth_flags` and `add_set`, if at all.
        host_fields: function of the parsed arguments that returns the fields of the host's config; if it raises a
            `UserError`, only the options of depth attention are known.
        words: the words of the command line; `sys.argv[1:]` by default.

    Raises:
        UserError: if the command line cannot be parsed.
    """
    args, unknown = parser.parse_known_args(sys.argv[1:] if words is None else words)
    if unknown:
        try:
            fields = {*DEPTH_OPTIONS, *host_fields(args)}
        except UserError:
            fields = {*DEPTH_OPTIONS}
        advice = " ".join(_instead(unknown, fields)) if hasattr(args, "set") else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice and f'; use {advice}'}")
    return args


def _instead(unknown: list[str], fields: set[str]) -> Iterator[str]:
    for word, following in zip(unknown, [*unknown[1:], "--"], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in fields:
            yield _assignment(name, value if equals else "VALUE" if following.startswith("--") else following)


@contextmanager
def options_as_flags() -> Iterator[None]:
    """Let user errors within the context name options as the command line does.

    `norm_position='post'` becomes `--set norm_position=post`, and `connection='residual'` `--connection residual`.
    """
    try:
        yield
    except UserError as error:
        raise UserError(_ASSIGNMENT.sub(_replacement, str(error))) from error


def _replacement(found: re.Match[str]) -> str:
    name, value = found.groups()
    if name not in DEPTH_OPTIONS:
        return found[0]
    return _assignment(name, json.dumps(_PYTHON_NAMES[value]) if value in _PYTHON_NAMES else value.strip("'"))


def _assignment(name: str, value: str) -> str:
    return f"--{name.replace('_', '-')} {value}" if name in FLAGS and value != "null" else f"--set {name}={value}"
