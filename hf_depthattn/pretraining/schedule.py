"""Length of a training run, and the schedule of its learning rate."""

import math
from typing import Any

from ..errors import UserError

#: Schedule -> its name in transformers.
SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}


def check_schedule(*, epochs: float, warmup: float, decay: float, min_lr: float) -> None:
    """Check the values that determine a schedule.

    Args:
        epochs: passes over the text.
        warmup: steps of warm-up, or their share of all steps if below 1.
        decay: share of the steps in which `"wsd"` decays.
        min_lr: final learning rate / peak.

    Raises:
        UserError: if a value is out of range.
    """
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs {epochs:g}: must be more than 0.")
    if not 0 <= warmup < math.inf:
        raise UserError(f"--warmup {warmup:g}: must be at least 0.")
    for name, value in (("decay", decay), ("min-lr", min_lr)):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} {value:g}: must be from 0 to 1.")


def scheduler_arguments(
    schedule: str, steps: int, warmup_steps: int, *, decay: float, min_lr: float
) -> dict[str, Any]:
    """Return the `lr_scheduler_kwargs` of transformers' `TrainingArguments`.

    Args:
        schedule: one of `SCHEDULES`.
        steps: number of optimizer steps.
        warmup_steps: number of steps of warm-up.
        decay: share of the steps in which `"wsd"` decays.
        min_lr: final learning rate / peak.

    Raises:
        UserError: if warm-up and decay have more steps than there are.
    """
    is_wsd = schedule == "wsd"
    # Rounded down, as warm-up is rounded up: shares that sum to 1 fit.
    decay_steps = int(decay * steps) if is_wsd else 0
    if warmup_steps + decay_steps > steps:
        of_decay = f" and {decay_steps} of decay (--decay)" if is_wsd else ""
        raise UserError(f"--warmup: {warmup_steps} steps of warm-up{of_decay} are more than all {steps} steps.")
    return {"num_decay_steps": decay_steps, "min_lr_ratio": min_lr} if is_wsd else {"min_lr_rate": min_lr}
