"""The files of a PEFT adapter, looked at before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..utils.paths import user_path
from .checkpoint_files import read_json, read_shard

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_no_adapter(folder: Path, name: str | None = None) -> None:
    """Refuse the folder of an adapter where a model is needed.

    Args:
        folder: what was named as a model.
        name: how the user named it; the folder by default.

    Raises:
        UserError: with what to do instead.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the base model that the adapter names, wherever that lies, and the adapter on it.
        raise UserError(
            f"{name or folder}: holds an adapter ({ADAPTER_CONFIG}). For eval and report, give its base model, and "
            "this folder as --peft. Otherwise merge it into its base model first (AutoPeftModelForCausalLM, "
            "merge_and_unload(), save_pretrained() to another folder)."
        )


def adapter_folder(adapter: str | Path) -> Path:
    """The folder of an adapter, when its files are there.

    Raises:
        UserError: a file is missing, damaged, or a pickle.
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
