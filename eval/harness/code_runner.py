"""Runs one generated program in a process of its own, with limits on time, memory and what it writes.

The limits keep an endless loop or a huge list from taking the machine along. They are not a sandbox: the program has
this user's rights and files, and the network. That is why nothing reaches this file without lm-eval's flag for unsafe
code.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

TIMEOUT_SECONDS = 10.0
MEMORY_BYTES = 2 * 1024**3
WRITTEN_BYTES = 16 * 1024**2

_SUPERVISOR = Path(__file__).with_name("code_supervisor.py")
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
# What the supervisor gets to start and to clear away, beside the time of the program.
_SPARE_SECONDS = 10.0

# The limits are set inside the new process: code that runs between fork and exec can deadlock in a program with
# threads, which torch has. That the program ran to its end is told by a word, not by the exit code: one that leaves
# early with exit code 0 has not passed.
_BOOTSTRAP = """
import sys
memory, written, seconds, program = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass
with open(program, encoding="utf-8") as file:
    source = file.read()
word = sys.stdin.readline().strip()
sys.argv = [program]
exec(compile(source, program, "exec"), {"__name__": "__main__"})
with open(program + ".passed", "w", encoding="utf-8") as file:
    file.write(word)
"""


def passes(source: str, *, timeout_seconds: float = TIMEOUT_SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether a program runs to its end without an exception.

    When it ends or its time is over, everything that it started is killed, on Linux also what has left its session.
    It runs in an empty folder that is removed afterwards, without input or output, and with an environment of `PATH`
    only. The processes above it have no other environment either, up to this one, which the program does not see
    where the system has namespaces (`code_supervisor`).

    Args:
        source: Python code, the tests included.
        timeout_seconds: wall-clock limit.
        memory_bytes: limit of the address space, where the system has one (not on Windows).
    """
    word = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="depthattn-code-"))
    try:
        program = folder / "program.py"
        try:
            program.write_text(source, encoding="utf-8")
        except UnicodeEncodeError:
            # A lone surrogate from the tokenizer: no Python program.
            return False
        limits = [str(memory_bytes), str(WRITTEN_BYTES), str(int(timeout_seconds) + 1)]
        command = [sys.executable, "-I", "-c", _BOOTSTRAP, *limits, str(program)]
        if os.name == "posix":
            command = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(timeout_seconds), *command]
        process = subprocess.Popen(
            command,
            cwd=folder,
            # One thread: the buffers of a thread pool count as memory.
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        spare = _SPARE_SECONDS if os.name == "posix" else 0.0
        try:
            process.communicate(f"{word}\n".encode(), timeout=timeout_seconds + spare)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
        passed = Path(f"{program}.passed")
        return process.returncode == 0 and passed.is_file() and passed.read_text(errors="replace") == word
    finally:
        _remove(folder)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and, where there are process groups, its own, also when it has ended itself."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _remove(folder: Path) -> None:
    """Remove a folder, however deep its folders lie in each other; what cannot be removed stays.

    Neither recursive nor by long paths: down into a folder and back up by its `..`.
    """
    if os.open not in os.supports_dir_fd:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError):
        descriptor = os.open(folder, _FOLDER)
        try:
            names: list[str] = []
            folders = [_remove_files(descriptor)]
            while names or folders[-1]:
                if folders[-1]:
                    names.append(folders[-1].pop())
                    os.chmod(names[-1], 0o700, dir_fd=descriptor)
                    descriptor = _step(descriptor, names[-1])
                    folders.append(_remove_files(descriptor))
                else:
                    descriptor = _step(descriptor, "..")
                    folders.pop()
                    os.rmdir(names.pop(), dir_fd=descriptor)
        finally:
            os.close(descriptor)
        os.rmdir(folder)


def _step(descriptor: int, name: str) -> int:
    """Open a folder beside or above an open one, which is closed."""
    opened = os.open(name, _FOLDER, dir_fd=descriptor)
    os.close(descriptor)
    return opened


def _remove_files(descriptor: int) -> list[str]:
    """Remove everything but folders from an open folder; the names of its folders."""
    with os.scandir(descriptor) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=descriptor)
    return [name for name, is_folder in found if is_folder]
