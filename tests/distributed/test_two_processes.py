"""FSDP2, DDP, tensor and context parallelism on two gloo processes: loss and gradients of one process.

A test is one start of the processes with many checks, since starting them takes longer than a check.
"""

import pytest
import torch
import transformers
from packaging.version import Version
from process_groups import passed_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)
if torch.distributed.is_available():
    from context_parallel_checks import CHECKS as CONTEXT_PARALLEL
    from token_shard_checks import CHECKS as TOKEN_SHARD
    from token_shard_checks import OF_FOUR
    from token_shard_checks import QUICK as QUICK_TOKEN_SHARD
    from two_processes import CHECKS

    FURTHER = {"fsdp-of-transformers", "tp-block", "tp-value-residual", "fsdp2-block", "ddp-block"}
    #: name -> whether it is in `make test`
    # With transformers 5.16, experts in two processes give wrong gradients of the router, of stock models too.
    HAS_EXPERTS = Version(transformers.__version__) >= Version("5.17")
    ALL = {name: name not in FURTHER for name in CHECKS if HAS_EXPERTS or not name.startswith("ep-")}
    ALL |= {f"context_parallel_checks:{name}": name in ("block", "moda") for name in CONTEXT_PARALLEL}
    ALL |= {f"token_shard_checks:{name}": name in QUICK_TOKEN_SHARD for name in TOKEN_SHARD if name not in OF_FOUR}
    QUICK, SLOW = ([name for name, is_quick in ALL.items() if is_quick is wanted] for wanted in (True, False))
else:
    QUICK = SLOW = []


def test_two_processes_compute_what_one_does(tmp_path):
    assert passed_checks(QUICK, tmp_path) == QUICK


@pytest.mark.slow
def test_two_processes_compute_what_one_does_in_further_cases(tmp_path):
    assert passed_checks(SLOW, tmp_path) == SLOW
