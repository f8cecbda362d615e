"""FSDP2, DDP, tensor and context parallelism on two gloo processes: loss and gradients of one process."""

import pytest
import torch
from process_pair import passed_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)
if torch.distributed.is_available():
    from context_parallel_checks import CHECKS as CONTEXT_PARALLEL
    from two_processes import CHECKS

    OF_CONTEXT_PARALLEL = [f"context_parallel_checks:{name}" for name in CONTEXT_PARALLEL]
    QUICK = [*CHECKS, "context_parallel_checks:block", "context_parallel_checks:moda"]
    SLOW = [name for name in OF_CONTEXT_PARALLEL if name not in QUICK]
else:
    QUICK = SLOW = []


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> list[str]:
    return passed_checks(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> list[str]:
    return passed_checks(tmp_path_factory.mktemp("slow"), SLOW)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_compute_what_one_does(quick, name):
    assert name in quick


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_two_processes_compute_what_one_does_in_further_cases(slow, name):
    assert name in slow
