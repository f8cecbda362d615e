"""Schedules: values out of range are refused, and the learning rate is as described at every step."""

import math

import pytest
import torch
from transformers import get_scheduler

from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.schedule import SCHEDULES, check_schedule, scheduler_arguments

GOOD = {"epochs": 1.0, "warmup": 0.05, "decay": 0.2, "min_lr": 0.1}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0.0, "--epochs 0: must be more than 0"),
        ("epochs", math.nan, "--epochs nan: must be more than 0"),
        ("warmup", -1.0, "--warmup -1: must be at least 0"),
        ("decay", 5.0, "--decay 5: must be from 0 to 1"),
        ("decay", -0.1, "--decay -0.1: must be from 0 to 1"),
        ("min_lr", 1.5, "--min-lr 1.5: must be from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(field, value, message):
    check_schedule(**GOOD)
    with pytest.raises(UserError, match=message):
        check_schedule(**{**GOOD, field: value})


def test_warmup_and_decay_must_fit():
    with pytest.raises(UserError, match=r"5 steps of warm-up and 8 of decay \(--decay\) are more than all 10 steps"):
        scheduler_arguments("wsd", 10, 5, decay=0.8, min_lr=0.1)
    with pytest.raises(UserError, match="--warmup: 11 steps of warm-up are more than all 10 steps"):
        scheduler_arguments("cosine", 10, 11, decay=0.2, min_lr=0.1)
    # Halves of an odd number of steps fit.
    assert scheduler_arguments("wsd", 3, 2, decay=0.5, min_lr=0.1)["num_decay_steps"] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_rises_to_the_peak_and_falls_to_the_minimum(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = scheduler_arguments(schedule, 20, 4, decay=0.5, min_lr=0.1)
    scheduler = get_scheduler(SCHEDULES[schedule], optimizer, 4, 20, arguments)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == sorted(rates[:5]) and rates[4] == 1.0 and rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == 1.0 if schedule == "wsd" else rates[10] < 1.0
