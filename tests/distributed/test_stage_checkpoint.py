"""Pipelines on several gloo processes save checkpoints and resume (`support/checkpoint_processes.py`)."""

import needs_stage_interface  # noqa: F401
import pytest
from checkpoint_processes import GROUPS
from process_groups import passed_cases


def test_two_processes_save_one_checkpoint_and_resume(tmp_path):
    """The folder of the whole model, its logits; the losses of an uninterrupted training; errors in both processes."""
    assert passed_cases("checkpoint_processes.py", 2, tmp_path, "two") == list(GROUPS["two"])


@pytest.mark.slow
@pytest.mark.parametrize(("group", "num_processes"), [("all-of-two", 2), ("four", 4)])
def test_every_kind_of_model_is_saved_and_resumed(tmp_path, group, num_processes):
    assert passed_cases("checkpoint_processes.py", num_processes, tmp_path, group) == list(GROUPS[group])
