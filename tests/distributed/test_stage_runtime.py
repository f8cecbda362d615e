"""What the stage of the engine refuses, by name."""

import needs_stage_interface  # noqa: F401
import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage

from hf_depthattn.distributed.stage_runtime import check_stage_interface, refuse_split_backward


def test_the_stage_of_an_older_torch_is_refused_by_what_it_lacks():
    check_stage_interface(PipelineStage)
    with pytest.raises(ImportError, match=r"PipelineStage of torch \S+ has no _compute_input_grads"):
        check_stage_interface(nn.Module)


@pytest.mark.parametrize("kind", ["FSDP2", "DistributedDataParallel"])
def test_zero_bubble_schedules_are_refused_for_wrapped_stages(process_group, kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refuse_split_backward(model)
    if kind == "FSDP2":
        # A layer alone is enough.
        fully_shard(model[0], mesh=dist.init_device_mesh("cpu", (1,)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=rf"zero-bubble schedules .* are not possible with {kind}"):
        refuse_split_backward(model)
