"""Start two processes that run checks of `two_processes.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from repository import ROOT


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def passed_checks(folder: Path, names: list[str]) -> list[str]:
    """Return the names of the checks that both processes have passed; one start of two processes for all.

    Args:
        folder: an empty folder for the processes.
        names: names of checks, as `two_processes.py` takes them.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    command = [sys.executable, str(ROOT / "tests/support/two_processes.py"), str(folder), *names]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    first, second = (output.split() for output, _ in outputs)
    return [name for name in first if name in second]
