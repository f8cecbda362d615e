"""Runs one program and kills everything that it started. `code_runner` runs this file in a process of its own.

Where the system allows it (Linux, as root or with user namespaces), the program has process numbers of its own: it
sees no process but its own, and none of them outlives the first. Elsewhere on Linux this process is the one to which
orphans fall, also those in a session of their own, and it kills its children until there are none. On other systems
`code_runner` kills the process group.

Standard library only, and no import of this package: it is started with `-I`.

Arguments: seconds, then the command of the program.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

_NEW_MOUNTS, _NEW_USER, _NEW_PIDS = 0x20000, 0x10000000, 0x20000000
_PRIVATE, _NO_SUID_DEV_EXEC = (1 << 18) | 16384, 2 | 4 | 8
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36


def main() -> int:
    """Run the program; 0 if it ended with 0 in time."""
    seconds, command = float(sys.argv[1]), sys.argv[2:]
    libc = _libc()
    is_apart = False
    if libc is not None:
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)
        is_apart = _unshare(libc)
    first = os.fork()
    if first == 0:
        _run_first(libc, is_apart, command)
    status = _wait(first, time.monotonic() + seconds)
    if status is None:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    _kill_children()
    return 0 if status == 0 else 1


def _libc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _unshare(libc: Any) -> bool:
    """Children get process numbers of their own, if the system allows it."""
    if os.geteuid() == 0:
        return bool(libc.unshare(_NEW_MOUNTS | _NEW_PIDS) == 0)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS) != 0:
        return False
    # Without them the numbers of processes are apart all the same; files belong to nobody in here.
    with suppress(OSError):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _run_first(libc: Any, is_apart: bool, command: list[str]) -> None:
    """The first process of the new numbers: the others are killed when it ends. It ignores signals from them."""
    if libc is not None:
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if is_apart:
        # `/proc` of the new numbers shows nothing of the processes outside.
        libc.mount(None, b"/", None, _PRIVATE, None)
        libc.mount(b"proc", b"/proc", b"proc", _NO_SUID_DEV_EXEC, None)
    program = os.fork()
    if program == 0:
        os.setsid()
        os.execv(command[0], command)
    _, status = os.waitpid(program, 0)
    os._exit(0 if status == 0 else 1)


def _wait(process: int, deadline: float) -> int | None:
    """The status of a process, None if it still runs at the deadline."""
    pause = 0.002
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return None


def _kill_children() -> None:
    """Kill what is left, and what falls to this process when that is gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _children() -> list[int]:
    children = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    # The name of a program, in brackets, may hold anything.
                    parent = file.read().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                children.append(int(name))
    return children


if __name__ == "__main__":
    sys.exit(main())
