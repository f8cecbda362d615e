"""FSDP2, DDP, tensor and context parallelism on two gloo processes: loss and gradients of one process."""

import pytest
import torch
from process_groups import passed_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)
if torch.distributed.is_available():
    from context_parallel_checks import CHECKS as CONTEXT_PARALLEL
    from two_processes import CHECKS

    ALL = [*CHECKS, *(f"context_parallel_checks:{name}" for name in CONTEXT_PARALLEL)]
    FURTHER = {"fsdp-of-transformers", "tp-block", "tp-value-residual", "fsdp2-block", "ddp-block"}
    FURTHER |= {f"context_parallel_checks:{name}" for name in CONTEXT_PARALLEL if name not in ("block", "moda")}
    QUICK, SLOW = [name for name in ALL if name not in FURTHER], [name for name in ALL if name in FURTHER]
else:
    QUICK = SLOW = []


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[str]:
    return passed_checks("two_processes.py", QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> list[str]:
    return passed_checks("two_processes.py", SLOW, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_compute_what_one_does(quick, name):
    assert name in quick


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_compute_what_one_does_in_further_cases(slow, name):
    assert name in slow
