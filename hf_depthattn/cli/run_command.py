"""Run a command: user errors become one line and exit code 2; bugs keep their traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors.messages import user_error

EXIT_OK, EXIT_DIFFERENT, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class _Interrupted(KeyboardInterrupt):
    """An interrupt with advice on how to continue."""


@contextmanager
def advice_after_interrupt(advice: str) -> Iterator[None]:
    """Let `run_command` print this advice after an interrupt within the context.

    Args:
        advice: the text, which replaces "nothing was left behind".
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise _Interrupted(advice) from error


def run_command(command: Callable[[], int], program: str = "depthattn") -> int:
    """Run a command, and print user errors as one line on stderr.

    Args:
        command: function that returns the exit code.
        program: name of the program in the messages.

    Returns:
        The exit code of the command, 2 after a user error, or 130 after an interrupt.

    Raises:
        Exception: any error that is not a user error.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _say(program, f"interrupted; {error if isinstance(error, _Interrupted) else 'nothing was left behind'}")
        return EXIT_INTERRUPTED
    except Exception as error:
        message = user_error(error)
        if message is None:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None:
            _close_stdout()
        _say(program, f"error: {message}")
        return EXIT_USER_ERROR


def _say(program: str, text: str) -> None:
    with suppress(OSError):
        print(f"{program}: {text}", file=sys.stderr)


def _close_stdout() -> None:
    """Discard output that could not be written: Python would try again at exit, and print another error."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
