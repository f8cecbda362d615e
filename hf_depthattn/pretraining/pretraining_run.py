"""The folder of a pretraining run: settings, checkpoints of Trainer, and in the end the finished model.

    FOLDER/settings.json    what the run was started with; a resumed run must have the same
    FOLDER/tokenizer        its tokenizer
    FOLDER/checkpoints      checkpoints of Trainer
    FOLDER/logs             for TensorBoard
    FOLDER/log.json         all logged values
    FOLDER/model            the finished model

The last two appear when training is complete, each at once, and a run with a model is finished.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..conversion.output_folder import complete_folder
from ..errors import UserError
from ..model_card import CARD_NAME, write_missing_card
from ..utils.result_files import json_text, read_object, to_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from ..modeling_depthattn import DepthAttnForCausalLM


class PretrainingRun:
    """A run in a folder.

    Args:
        folder: the folder.

    Attributes:
        folder: the folder.
        checkpoints: the `output_dir` of Trainer.
        logs: folder for TensorBoard.
        model: the finished model.
        log: file for all logged values.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.logs = folder / "logs"
        self.model = folder / "model"
        self.log = folder / "log.json"
        self._tokenizer = folder / "tokenizer"
        self._settings_file = folder / "settings.json"

    def check_new(self) -> None:
        """Check that the folder does not exist or is empty.

        Raises:
            UserError: if it contains something.
        """
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder}: exists and is not empty; choose another folder, or resume its run.")

    def start(self, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> None:
        """Create the folder.

        Args:
            tokenizer: the tokenizer, which a resumed run reads again.
            settings: what determines the run, as JSON values.

        Raises:
            UserError: if the folder contains something, or writing fails.
        """
        self.check_new()
        self.folder.mkdir(parents=True, exist_ok=True)
        with complete_folder(self._tokenizer.resolve(), overwrite=False, is_checkpoint=False) as partial:
            tokenizer.save_pretrained(partial)
        # Written last: with this file, the run can be resumed.
        write_text(self._settings_file, json_text(to_json(settings)))

    def resume(self, settings: dict[str, Any]) -> Path | None:
        """Check that the run can be continued, and return its last complete checkpoint.

        Args:
            settings: what determines the run, as JSON values; they must be those of the start.

        Returns:
            The folder of the checkpoint, or `None` if the run was killed before the first one.

        Raises:
            UserError: if the folder contains no run or a finished one, or a setting differs.
        """
        if not self._settings_file.is_file():
            raise UserError(f"{self.folder}: contains no run to resume.")
        if self.model.exists():
            raise UserError(f"{self.folder}: its run is finished; the model is in {self.model}.")
        before, now = read_object(self._settings_file), to_json(settings)
        for name in sorted({*before, *now}):
            old, new = before.get(name), now.get(name)
            if old != new:
                raise UserError(f"{name}: was {old!r} when the run in {self.folder} was started, and is {new!r} now.")
        return last_checkpoint(self.checkpoints)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a run that was started."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._tokenizer)
        return tokenizer

    def finish(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, training: dict[str, Any]) -> None:
        """Write the log, then the trained model with its code, card and tokenizer; all processes must call it.

        Args:
            trainer: the Trainer.
            tokenizer: the tokenizer.
            training: rows of the table on training in the card, which has the name of the folder.

        Raises:
            UserError: if writing fails.
        """
        # Weights of a sharded model (FSDP) are gathered by all processes.
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not trainer.is_world_process_zero():
            return
        # The model comes last: with it, the run is finished.
        write_text(self.log, json_text(trainer.state.log_history))
        model = cast("DepthAttnForCausalLM", trainer.accelerator.unwrap_model(trainer.model))
        name = self.folder.resolve().name
        with complete_folder(self.model.resolve(), overwrite=False) as partial:
            write_missing_card(partial, model.config, depth_class="DepthAttnForCausalLM", name=name)
            rows = "\n".join(f"| {key} | {value} |" for key, value in training.items())
            with (partial / CARD_NAME).open("a", encoding="utf-8") as card:
                card.write(f"\n## Training\n\nFrom scratch.\n\n| | |\n|---|---|\n{rows}\n")
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of Trainer in a folder, if there is one.

    Args:
        folder: the `output_dir` of Trainer, which need not exist.
    """
    complete = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.partition("-")[2]
        if number.isdecimal() and _is_complete(path):
            complete[int(number)] = path
    return complete[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes this file last, and not atomically.
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
