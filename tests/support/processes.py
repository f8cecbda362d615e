"""Run Python in a separate process."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(*arguments: str, cwd: Path, python_path: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run the interpreter of the tests with one thread and capture its output.

    Args:
        *arguments: a script and its arguments, or `-c` and code.
        cwd: working directory.
        python_path: `PYTHONPATH`; use `str(ROOT)` to make this checkout importable.
        **environment: further environment variables.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
