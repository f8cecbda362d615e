"""The order of forwards and backwards on one rank, which decides how many microbatches are in flight.

It is that of torch's schedules (`torch.distributed.pipelining`), which run it; here it is only counted.
"""

from enum import StrEnum
from typing import NamedTuple

from ..depth_options import require_member


class CountedSchedule(StrEnum):
    """Schedules whose memory is planned, with torch's class in `torch.distributed.pipelining`."""

    GPIPE = "gpipe"  #: ScheduleGPipe; with several stages per rank, ScheduleLoopedBFS
    ONE_F_ONE_B = "1f1b"  #: Schedule1F1B, one stage per rank
    INTERLEAVED = "interleaved"  #: ScheduleInterleaved1F1B


class Step(NamedTuple):
    """The forward or backward of one microbatch in one stage.

    Attributes:
        is_forward: whether it is the forward.
        chunk: the stage, as its number on the rank, 0 to V - 1.
        microbatch: number of the microbatch.
    """

    is_forward: bool
    chunk: int
    microbatch: int


def rank_steps(schedule: str, rank: int, num_ranks: int, num_virtual: int, num_microbatches: int) -> list[Step]:
    """Return the steps of a rank in order.

    Args:
        schedule: a `CountedSchedule`.
        rank: the rank.
        num_ranks: number of ranks, P.
        num_virtual: stages per rank, V.
        num_microbatches: microbatches per optimizer step, M.

    Raises:
        ValueError: if the schedule is unknown, 1F1B has several stages per rank or fewer microbatches than ranks, or
            the interleaved schedule cannot split the microbatches into rounds.
    """
    require_member("schedule", schedule, CountedSchedule)
    if num_virtual > 1 and schedule == CountedSchedule.ONE_F_ONE_B:
        raise ValueError(
            f"num_virtual: {num_virtual} is not possible with schedule='1f1b', only 1; use 'interleaved'."
        )
    total = num_virtual * num_microbatches
    if schedule == CountedSchedule.GPIPE:
        warmup, per_round = total, num_microbatches
    elif schedule == CountedSchedule.ONE_F_ONE_B:
        if num_microbatches < num_ranks:
            raise ValueError(
                f"num_microbatches: {num_microbatches} is not possible with schedule='1f1b' on {num_ranks} ranks; it "
                f"must be at least {num_ranks}."
            )
        warmup, per_round = num_ranks - rank - 1, num_microbatches
    else:
        num_rounds = max(1, num_microbatches // num_ranks)
        if num_microbatches % num_rounds:
            raise ValueError(
                f"num_microbatches: {num_microbatches} is not possible with schedule='interleaved' on {num_ranks} "
                f"ranks; it must be a multiple of {num_rounds}."
            )
        per_round = num_microbatches // num_rounds
        warmup = (num_virtual - 1) * per_round + 2 * (num_ranks - 1 - rank)
    order = [
        (chunk, first + offset)
        for first in range(0, num_microbatches, per_round)
        for chunk in range(num_virtual)
        for offset in range(per_round)
    ]
    forwards = [Step(True, chunk, microbatch) for chunk, microbatch in order]
    backwards = [Step(False, num_virtual - 1 - chunk, microbatch) for chunk, microbatch in order]
    warmup = min(warmup, total)
    steps = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        steps += [forward, backward]
    return steps + backwards[total - warmup :]
