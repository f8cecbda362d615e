"""Options of `depthattn report`, with checks that do not import torch and therefore report mistakes quickly."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ...checkpoints.adapter_files import adapter_folder
from ...checkpoints.source_folder import find_checkpoint
from ...errors import UserError
from ...utils.argument_checks import check_at_least, check_dtype
from ..model_folder import written_limit

#: Defaults.
NUM_SEQUENCES, SEQUENCE_LENGTH, BATCH_SIZE = 16, 128, 4
_LIBRARIES = {"altair": "altair", "vl_convert": "vl-convert-python"}


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        model: folder or Hub id of a checkpoint.
        out: output folder.
        text: the text.
        text_name: file name of the text.
        compare: second checkpoint, measured on the same text.
        peft: folder of a PEFT adapter for `model`.
        revision: branch, tag or commit of `model` on the Hub.
        num_sequences: number of windows; by default `NUM_SEQUENCES`, or all if there are fewer.
        sequence_length: tokens per window; by default `SEQUENCE_LENGTH`, or the model's context length if smaller.
        batch_size: windows per forward pass.
        dtype: one of `utils.argument_checks.DTYPES`.
        device: device of the models.
        trust_remote_code: allow code that is part of the checkpoints.
        full: also measure expensive metrics.
        overwrite: discard another report in the folder.
        progress: as in `utils.progress.progress_bar`.
    """

    model: str
    out: Path
    text: str
    text_name: str
    compare: str | None = None
    peft: str | None = None
    revision: str | None = None
    num_sequences: int | None = None
    sequence_length: int | None = None
    batch_size: int = BATCH_SIZE
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    full: bool = False
    overwrite: bool = False
    progress: bool | None = False


def check_values(*, num_sequences: int | None, sequence_length: int | None, batch_size: int, dtype: str) -> None:
    """Check numbers and dtype, and that the libraries for figures are installed.

    Args:
        num_sequences: number of windows, or `None` for the default.
        sequence_length: tokens per window, or `None` for the default.
        batch_size: windows per forward pass.
        dtype: name of the dtype of the models.

    Raises:
        UserError: if a value is invalid or a library is missing.
    """
    check_at_least({"num_sequences": num_sequences, "sequence_length": sequence_length}, 2)
    check_at_least({"batch_size": batch_size}, 1)
    check_dtype(dtype)
    missing = [package for module, package in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; pip install 'hf-depthattn[eval]'.")


def check_models(options: ReportOptions) -> None:
    """Check that the checkpoints and the adapter exist, and that the windows fit into their context length.

    Raises:
        UserError: if one is missing, or its context is too short.
    """
    if options.peft is not None:
        adapter_folder(options.peft)
    folders = [(options.model, find_checkpoint(options.model, options.revision))]
    if options.compare is not None:
        folders.append((options.compare, find_checkpoint(options.compare)))
    for name, folder in folders:
        limit = written_limit(folder)
        if limit is not None and (options.sequence_length or 0) > limit:
            raise UserError(
                f"--sequence-length {options.sequence_length}: exceeds the context length of {name}, {limit} tokens."
            )
