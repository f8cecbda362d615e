"""Progress of `Trainer` as in the commands: a bar on a terminal, lines elsewhere, and a line for each logged loss."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..utils.progress import progress_bar


def show_progress(trainer: Trainer, shown: bool | None = None) -> None:
    """Replace the progress bar of a Trainer, which prints all logged values, by `TrainingProgressCallback`.

    Args:
        trainer: the Trainer.
        shown: as in `progress_bar`; `False` shows nothing.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if shown is not False:
        trainer.add_callback(TrainingProgressCallback(shown))


class TrainingProgressCallback(TrainerCallback):
    """Shows the number of steps, and prints training losses and held-out losses in nats per token.

    Args:
        shown: as in `progress_bar`.
    """

    def __init__(self, shown: bool | None = None):
        self.shown = shown
        self._bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            # A resumed run counts the remaining steps, by which the remaining time is estimated.
            self._bar = progress_bar(state.max_steps - state.global_step, "training", self.shown, unit="steps")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._bar is None or logs is None:
            return
        step = f"step {state.global_step} of {state.max_steps}"
        if "eval_loss" in logs:
            self._say(f"{step}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            rate = f", learning rate {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            self._say(f"{step}: loss {float(logs['loss']):.4f}{rate}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        # A bar of tqdm prints above itself.
        write = getattr(self._bar, "write", None)
        if write is not None:
            write(line)
        else:
            print(line, flush=True)
