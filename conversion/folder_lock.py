"""A lock that lets one run at a time write an output folder, and a search for leftovers of killed runs."""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: A leftover of another machine may be removed if nothing in it has changed for this long.
SECONDS_UNTIL_DEAD = 24 * 3600

# Some file systems have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def folder_lock(target: Path) -> Iterator[bool]:
    """Lock an output folder with a lock file beside it, which the operating system unlocks when the process ends.

    It also works between containers that share a kernel, and between machines if their file system supports locks.

    Args:
        target: the output folder; its parent must exist.

    Yields:
        Whether the folder is locked: not all file systems support locks.

    Raises:
        UserError: if another run holds the lock.
    """
    path = target.with_name(f".{target.name}.lock")
    descriptor, locked = _open_locked(path, target)
    try:
        yield locked
    finally:
        # Removed while still locked: a run that opened this file sees that it is gone, and creates a new one.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _open_locked(path: Path, target: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                return descriptor, False
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor, True
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"{target}: another run is writing it; wait for it, or choose another folder.") from error
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor, False
            os.close(descriptor)
            raise
        os.close(descriptor)


def sibling(target: Path, role: str) -> Path:
    """Return an unused path beside a folder: `.NAME.ROLE-MACHINE-TOKEN`."""
    return target.with_name(f".{target.name}.{role}-{_host_name()}-{secrets.token_hex(8)}")


def dead_siblings(target: Path, role: str) -> list[Path]:
    """Return the folders that killed runs left beside a folder; the caller must hold its lock.

    Folders made on this machine belong to killed runs, since a running one would hold the lock. Another machine may
    share the files but not the locks: its folders count if nothing in them has changed for a day.

    Args:
        target: the folder.
        role: as in `sibling`.
    """
    pattern = re.compile(rf"{re.escape(f'.{target.name}.{role}-')}(.+)-[0-9a-f]{{16}}")
    found = []
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and (match[1] == _host_name() or time.time() - _last_change(path) > SECONDS_UNTIL_DEAD):
            found.append(path)
    return found


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]


def _last_change(folder: Path) -> float:
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times)
