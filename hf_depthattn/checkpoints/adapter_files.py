"""Checks of the files of a PEFT adapter, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..utils.paths import user_path
from .checkpoint_files import read_json, read_shard

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_no_adapter(folder: Path, name: str | None = None) -> None:
    """Check that a folder contains a model and not an adapter.

    Args:
        folder: the folder.
        name: its name in messages; the folder by default.

    Raises:
        UserError: if it contains an adapter.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the adapter together with the base model named in its config.
        raise UserError(
            f"{name or folder}: is an adapter ({ADAPTER_CONFIG}). For eval and report, give its base model, and "
            "this folder as adapter (`peft`, --peft). Otherwise merge it into its base model first "
            "(AutoPeftModelForCausalLM, merge_and_unload(), save_pretrained() to another folder)."
        )


def adapter_folder(adapter: str | Path) -> Path:
    """Return the folder of an adapter after checking its files.

    Args:
        adapter: the folder.

    Raises:
        UserError: if a file is missing, damaged, or a pickle.
    """
    folder = user_path(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"--peft {adapter}: no such folder, or no {ADAPTER_CONFIG} in it.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"--peft {adapter}: no {ADAPTER_WEIGHTS} in it; adapters are read from safetensors files only."
        )
    read_json(folder / ADAPTER_CONFIG)
    read_shard(folder / ADAPTER_WEIGHTS)
    return folder
