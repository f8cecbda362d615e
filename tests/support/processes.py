"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(*arguments: str, cwd: Path, python_path: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run the interpreter of the tests on one thread, and keep what it prints.

    Args:
        *arguments: a script and its arguments, or `-c` and code.
        cwd: where it runs.
        python_path: `PYTHONPATH`; nothing of this checkout is found unless it is `str(ROOT)`.
        **environment: further variables.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
