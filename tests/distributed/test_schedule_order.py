"""The counted order of steps is the one that torch's schedules run."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from hf_depthattn.distributed.schedule_order import rank_steps

#: Class of torch -> our name.
CLASSES = {"ScheduleInterleaved1F1B": "interleaved", "Schedule1F1B": "1f1b", "ScheduleGPipe": "gpipe"}


def of_torch(name, num_ranks, num_virtual, num_microbatches):
    """The (is_forward, stage, microbatch) of every rank, from torch's own table."""
    loss = {"loss_fn": lambda output, target: output}
    stages = [stage_of(chunk * num_ranks, num_ranks, num_virtual) for chunk in range(num_virtual)]
    if name in ("ScheduleGPipe", "Schedule1F1B"):
        (stages,) = stages
    schedule = getattr(schedules, name)(stages, num_microbatches, **loss)
    if getattr(schedule, "pipeline_order", None) is None:
        pytest.skip("this version of torch has no table of the schedule")
    kinds = {schedules._ComputationType.FORWARD: True, schedules._ComputationType.FULL_BACKWARD: False}
    return {
        rank: [
            (kinds[action.computation_type], action.stage_index, action.microbatch_index)
            for action in actions
            if action is not None and action.computation_type in kinds
        ]
        for rank, actions in schedule.pipeline_order.items()
    }


def stage_of(index, num_ranks, num_virtual):
    """What a schedule asks a stage when it makes its table."""
    return SimpleNamespace(
        stage_index=index,
        num_stages=num_ranks * num_virtual,
        group_size=num_ranks,
        group_rank=0,
        group=None,
        submod=None,
        has_backward=True,
        is_first=index == 0,
        is_last=index == num_ranks * num_virtual - 1,
        stage_index_to_group_rank={stage: stage % num_ranks for stage in range(num_ranks * num_virtual)},
    )


@pytest.mark.parametrize(
    "name, num_ranks, num_virtual, num_microbatches",
    [
        ("ScheduleGPipe", 3, 1, 5),
        ("Schedule1F1B", 4, 1, 7),
        ("Schedule1F1B", 3, 1, 3),
        ("ScheduleInterleaved1F1B", 2, 2, 4),
        ("ScheduleInterleaved1F1B", 4, 3, 8),
        ("ScheduleInterleaved1F1B", 4, 2, 3),
        ("ScheduleInterleaved1F1B", 2, 3, 6),
    ],
)
def test_order_is_that_of_torch(name, num_ranks, num_virtual, num_microbatches):
    table = of_torch(name, num_ranks, num_virtual, num_microbatches)
    for rank in range(num_ranks):
        steps = rank_steps(CLASSES[name], rank, num_ranks, num_virtual, num_microbatches)
        found = [(step.is_forward, step.chunk * num_ranks + rank, step.microbatch) for step in steps]
        if name == "Schedule1F1B" and rank == num_ranks - 1:
            # torch's table, which it does not run here, begins the last rank with microbatch 1.
            found = [(is_forward, stage, number + is_forward) for is_forward, stage, number in found]
        assert found == table[rank]


def test_all_forwards_come_first_in_looped_bfs():
    steps = rank_steps("gpipe", 1, 2, 3, 4)
    assert [step.is_forward for step in steps] == [True] * 12 + [False] * 12
    assert [(step.chunk, step.microbatch) for step in steps[:5]] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert [(step.chunk, step.microbatch) for step in steps[12:17]] == [(2, 0), (2, 1), (2, 2), (2, 3), (1, 0)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("zbv", 0, 2, 2, 4), "schedule: 'zbv' is not one of 'gpipe', '1f1b', 'interleaved'"),
        (("1f1b", 0, 2, 2, 4), "num_virtual: 2 is not possible with schedule='1f1b', only 1"),
        (("1f1b", 0, 4, 1, 3), "num_microbatches: 3 .*'1f1b' on 4 ranks; it must be at least 4"),
        (("interleaved", 0, 2, 2, 5), "num_microbatches: 5 .* must be a multiple of 2"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_steps(*arguments)
