"""Runs a command: what the user can put right is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors.messages import user_error

EXIT_OK, EXIT_DIFFERENT, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class _Interrupted(KeyboardInterrupt):
    """An interrupt whose message says what to do next."""


@contextmanager
def advice_after_interrupt(advice: str) -> Iterator[None]:
    """What `run_command` says about an interrupt in here, in place of "nothing was left behind"."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise _Interrupted(advice) from error


def run_command(command: Callable[[], int]) -> int:
    """Run a command; what the user can put right becomes one line on stderr.

    Args:
        command: returns its exit code.

    Returns:
        That exit code, 2 after a mistake, 130 after an interrupt.

    Raises:
        Exception: a bug, as it is.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        _say(f"interrupted; {error if isinstance(error, _Interrupted) else 'nothing was left behind'}")
        return EXIT_INTERRUPTED
    except Exception as error:
        message = user_error(error)
        if message is None:
            raise
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and error.filename is None:
            _close_stdout()
        _say(f"error: {message}")
        return EXIT_USER_ERROR


def _say(text: str) -> None:
    with suppress(OSError):
        print(f"depthattn: {text}", file=sys.stderr)


def _close_stdout() -> None:
    """What could not be written there would be tried again, and complained about, when the process ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
