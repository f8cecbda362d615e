"""Progress of Trainer: losses in lines, the bar counts steps, and nothing else is printed."""

import pytest
from depth_forms import random_model
from training_models import rows, training_arguments
from transformers import Trainer

from hf_depthattn.integrations.training_progress import show_progress


@pytest.mark.parametrize("shown", [True, False])
def test_losses_are_lines_and_other_logs_are_not_printed(shown, tmp_path, capsys):
    args = training_arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = Trainer(random_model(sublayers_per_block=2), args, train_dataset=rows(), eval_dataset=rows(4))
    show_progress(trainer, shown)
    trainer.train()
    trainer.log({"other": 1.0})
    printed = capsys.readouterr()
    if not shown:
        assert printed.out == printed.err == ""
        return
    logged = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    lines = printed.out.splitlines()
    assert len(lines) == len(logged) == 6
    for line, entry in zip(lines, logged, strict=True):
        loss = f"loss {float(entry['loss']):.4f}, " if "loss" in entry else f"held-out loss {entry['eval_loss']:.4f}"
        assert line.startswith(f"step {entry['step']} of 4: {loss}")
    assert "training: 4 of 4 (100 %)" in printed.err
