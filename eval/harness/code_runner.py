"""Run one generated program in a separate process with limits on time, memory and file size.

The limits keep an endless loop or a huge list from bringing down the machine. They are not a sandbox: the program has
the permissions of this user, and network access. It therefore only runs with lm-eval's flag for unsafe code.
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
# Extra time for the supervisor to start and to clean up.
_SPARE_SECONDS = 10.0

# The limits are set inside the new process, since code between fork and exec can deadlock in a process with threads,
# as torch has. A secret word, not the exit code, shows that the program ran to its end: one that exits early with code
# 0 has not passed.
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
    """Return whether a program runs to its end without an exception.

    When it ends or times out, all processes that it started are killed; on Linux also those that have left its
    session. It runs in an empty temporary folder, without stdin or stdout, with an environment that only sets `PATH`
    and the number of threads. So does the supervisor, which prevents the program from reading the environment of this
    process where the system supports namespaces (`code_supervisor`).

    Args:
        source: Python code including the tests.
        timeout_seconds: wall-clock limit.
        memory_bytes: limit of the address space; not enforced on Windows.
    """
    word = secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="depthattn-code-"))
    try:
        program = folder / "program.py"
        try:
            program.write_text(source, encoding="utf-8")
        except UnicodeEncodeError:
            # A lone surrogate from the tokenizer: not a valid program.
            return False
        limits = [str(memory_bytes), str(WRITTEN_BYTES), str(int(timeout_seconds) + 1)]
        command = [sys.executable, "-I", "-c", _BOOTSTRAP, *limits, str(program)]
        if os.name == "posix":
            command = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(timeout_seconds), *command]
        process = subprocess.Popen(
            command,
            cwd=folder,
            # One thread, since the buffers of a thread pool count towards the memory limit.
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
    """Kill the process and, where process groups exist, its group, even if the process itself has ended."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _remove(folder: Path) -> None:
    """Remove a folder of any depth, ignoring files that cannot be removed.

    Neither recursive nor with long paths: descends into a folder and returns through `..`.
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
    """Open a folder relative to an open one and close the latter."""
    opened = os.open(name, _FOLDER, dir_fd=descriptor)
    os.close(descriptor)
    return opened


def _remove_files(descriptor: int) -> list[str]:
    """Remove everything except folders from an open folder; return the names of the folders."""
    with os.scandir(descriptor) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=descriptor)
    return [name for name, is_folder in found if is_folder]
