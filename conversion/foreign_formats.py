"""Names of the formats that can be imported and exported; does not import torch."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE
from ..errors import UserError

#: The format is recognised by the config and the names of tensors.
AUTO = "auto"
#: Formats that can be imported, by the names of their importers.
FORMATS = ("fla", "olmo-core-attn-res", "olmo-core-moda", "multi-head-attn-res", "kimi", "blagpt-moda")
#: Formats that can be exported.
EXPORT_FORMATS = ("fla",)

# Where a distributed checkpoint of OLMo-core or torch has its names and offsets, a pickle.
_METADATA = ("model_and_optim/.metadata", ".metadata")


def check_has_safetensors(folder: Path) -> None:
    """Check that a checkpoint is not in a form that must be converted to safetensors first.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if it is; the message has the command that converts it.
    """
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        raise UserError(
            f"{folder}: is a distributed checkpoint, whose names and offsets are in a pickle. Convert it where it was "
            "trained, and copy config.json to the result: from olmo_core.distributed.checkpoint import "
            f"unshard_checkpoint; unshard_checkpoint({str(metadata.parent)!r}, NEW_FOLDER, use_safetensors=True)"
        )
    pickles = sorted(path.name for path in folder.glob("*.pt"))
    if pickles:
        raise UserError(
            f"{folder}: has only a pickle ({pickles[0]}). Save its tensors as {SINGLE_FILE}, beside a config.json; "
            "docs/importing.md has the code."
        )
