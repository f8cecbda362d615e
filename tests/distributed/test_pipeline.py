"""Pipelines on several gloo processes compute what one process does (`support/pipeline_processes.py`)."""

import os
import subprocess
import sys

import needs_stage_interface  # noqa: F401
import pytest
import torch.distributed as dist
from pipeline_processes import GROUPS
from repository import ROOT
from tiny_hosts import random_ids, tiny_host_config
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.pipeline import build_pipeline


def passed_cases(num_processes: int, folder, group: str) -> list[str]:
    """Run a group of cases; one start of processes for all, since that takes longer than a case."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
    }
    script = str(ROOT / "tests/support/pipeline_processes.py")
    command = [sys.executable, script, str(num_processes), str(folder), group]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def test_two_processes_compute_what_one_does(tmp_path):
    """Loss and gradients, bytes as planned, nothing left, accumulation, new shapes, evaluation, the norm."""
    assert passed_cases(2, tmp_path, "two") == list(GROUPS["two"])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "num_processes"), [("all-of-two", 2), ("four", 4), ("fsdp2", 4), ("ddp", 4)])
def test_every_schedule_and_composition_computes_what_one_process_does(tmp_path, group, num_processes):
    assert passed_cases(num_processes, tmp_path, group) == list(GROUPS[group])


def config() -> DepthAttnConfig:
    return DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=1)


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        ("1F1B", {"stages_per_rank": 2}, "stages_per_rank: 2 is not possible with Schedule1F1B, only 1"),
        ("ZBVZeroBubble", {"stages_per_rank": 3}, "stages_per_rank: 3 is not possible with ScheduleZBVZeroBubble"),
        ("LoopedBFS", {"stages_per_rank": 4}, "num_stages: 4 must be between 1 and 3"),
        ("Interleaved", {}, "Unknown schedule name 'Interleaved'"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_by_name(process_group, schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pipeline(config(), schedule, num_microbatches=2, device="cpu", **arguments)


@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp"])
@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_zero_bubble_schedules_are_refused_with_data_parallelism(process_group, schedule, wrapper):
    mesh = dist.init_device_mesh("cpu", (1,))

    def parallelize(model):
        return nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model, mesh=mesh)

    with pytest.raises(ValueError, match="torch loses gradients silently; use GPipe, 1F1B"):
        build_pipeline(config(), schedule, num_microbatches=2, device="cpu", parallelize=parallelize)


def test_a_batch_that_does_not_split_is_refused(process_group):
    pipeline = build_pipeline(config(), "GPipe", num_microbatches=2, device="cpu")
    ids = random_ids(3, 5)
    with pytest.raises(ValueError, match="input_ids: 3 rows must be a multiple of num_microbatches 2"):
        pipeline.step(ids, ids)
