"""FSDP2, DDP and tensor parallelism on two gloo processes: loss and gradients of one process."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from repository import ROOT
from two_processes import CHECKS, PARALLEL_CHECKS

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> list[str]:
    """The names of the checks that both processes have passed; one start of two processes for all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    command = [sys.executable, str(ROOT / "tests/support/two_processes.py"), str(tmp_path_factory.mktemp("models"))]
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


@pytest.mark.parametrize("name", [*CHECKS, *PARALLEL_CHECKS])
def test_two_processes_compute_what_one_does(passed, name):
    assert name in passed
