"""Run one program and kill all processes that it started. `code_runner` runs this file in a separate process.

Where the system allows it (Linux, as root or with user namespaces), the program runs in its own PID namespace: it only
sees its own processes, and none of them outlives the first. Elsewhere on Linux this process is the subreaper of all
orphans, including those in another session, and kills its children until none is left. On other systems `code_runner`
kills the process group.

Started with `-I`, so it uses only the standard library and does not import this package.

Command-line arguments: the time limit in seconds, then the command to run.
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
    """Run the program; return 0 if it exits with 0 within the time limit."""
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
    """Give children their own PID namespace if the system allows it; return whether it does."""
    if os.geteuid() == 0:
        return bool(libc.unshare(_NEW_MOUNTS | _NEW_PIDS) == 0)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_PIDS) != 0:
        return False
    # Without user id maps the PID namespace still works, but files appear to belong to nobody.
    with suppress(OSError):
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _run_first(libc: Any, is_apart: bool, command: list[str]) -> None:
    """Run the init process of the namespace: when it ends the others are killed, and it ignores their signals."""
    if libc is not None:
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if is_apart:
        # Mount a `/proc` that does not show the processes outside the namespace.
        libc.mount(None, b"/", None, _PRIVATE, None)
        libc.mount(b"proc", b"/proc", b"proc", _NO_SUID_DEV_EXEC, None)
    program = os.fork()
    if program == 0:
        os.setsid()
        os.execv(command[0], command)
    _, status = os.waitpid(program, 0)
    os._exit(0 if status == 0 else 1)


def _wait(process: int, deadline: float) -> int | None:
    """Return the exit status of a process, or None if it is still running at the deadline."""
    pause = 0.002
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return None


def _kill_children() -> None:
    """Kill all children, including orphans that are re-parented to this process meanwhile."""
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
                    # The program name, in parentheses, may contain any character.
                    parent = file.read().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == os.getpid():
                children.append(int(name))
    return children


if __name__ == "__main__":
    sys.exit(main())
