"""Runs one generated program in a process of its own, with limits on time, memory and what it writes.

The limits keep an endless loop or a huge list from taking the machine along. They are no sandbox: the program has this
user's rights and the network. That is why nothing reaches this file without lm-eval's flag for unsafe code.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

TIMEOUT_SECONDS = 10.0
MEMORY_BYTES = 2 * 1024**3
WRITTEN_BYTES = 16 * 1024**2

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

    The program is killed with everything that it started when its time is over. It runs in an empty folder that is
    removed afterwards, with an environment of `PATH` only and without input or output.

    Args:
        source: Python code, the tests included.
        timeout_seconds: wall-clock limit.
        memory_bytes: limit of the address space, where the system has one (not on Windows).
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="depthattn-code-", ignore_cleanup_errors=True) as folder:
        program = Path(folder, "program.py")
        try:
            program.write_text(source, encoding="utf-8")
        except UnicodeEncodeError:
            # A lone surrogate from the tokenizer: no Python program.
            return False
        limits = [str(memory_bytes), str(WRITTEN_BYTES), str(int(timeout_seconds) + 1)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOTSTRAP, *limits, str(program)],
            cwd=folder,
            # One thread: the buffers of a thread pool count as memory.
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(f"{word}\n".encode(), timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill(process)
        passed = Path(f"{program}.passed")
        return process.returncode == 0 and passed.is_file() and passed.read_text(errors="replace") == word


def _kill(process: subprocess.Popen) -> None:
    """Kill the process and, where there are process groups, what it started, also when it has ended itself."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
