"""Start several processes that run checks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repository import ROOT, SUPPORT


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def passed_checks(names: list[str], folder: Path, num_processes: int = 2) -> list[str]:
    """Return the names of the checks that all processes have passed; one start of the processes for all checks.

    Args:
        names: names of checks of `two_processes.py`.
        folder: an empty folder for the processes.
        num_processes: number of processes.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT))),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "two_processes.py"), str(folder), *names],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    # At once: a process whose pipe is full would leave the others waiting.
    with ThreadPoolExecutor(num_processes) as pool:
        outputs = [*pool.map(subprocess.Popen.communicate, processes)]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    lines = [output.splitlines() for output, _ in outputs]
    return [name for name in names if all(name in printed for printed in lines)]


def passed_cases(file: str, num_processes: int, folder: Path, group: str) -> list[str]:
    """Return the names of the cases that all processes have passed; the script forks the processes itself.

    Args:
        file: a script in this folder. Its arguments are the number of processes, the folder and the group of cases.
        num_processes: number of processes.
        folder: an empty folder for the processes, also for their temporary files.
        group: name of a group of cases.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, SUPPORT))),
        "TMPDIR": str(folder),
    }
    command = [sys.executable, str(SUPPORT / file), str(num_processes), str(folder), group]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()
