"""What the arguments of `eval` and `report` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.adapter_files import check_no_adapter
from ..checkpoints.checkpoint_files import read_json, read_weight_files
from ..checkpoints.source_folder import find_folder
from ..errors import UserError
from ..utils.paths import user_path


def usable_device(named: str | None) -> str:
    """The device that was asked for, else a GPU if there is one.

    Raises:
        UserError: torch cannot use it here.
    """
    import torch

    from ..checkpoints.devices import check_device

    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def find_model(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, looked at before torch is imported: most mistakes are found here, at once.

    Raises:
        UserError: no such folder, an adapter in it, or a config or weight file that is missing or damaged.
    """
    folder, _ = find_folder(source, revision)
    check_no_adapter(folder, source)
    read_json(folder / "config.json")
    read_weight_files(folder)
    return folder


def written_limit(folder: Path) -> int | None:
    """The tokens that a model reads at most, where its config.json says so; a config may have a default as well."""
    config = read_json(folder / "config.json")
    for part in (config.get("text_config"), config):
        limit = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def is_local(source: str) -> bool:
    """Whether a source is a folder of this machine, not a Hub id."""
    return user_path(source).is_dir()


def default_run_folder(model: str, parts: Sequence[str]) -> Path:
    """`eval_results/<model>-<suite>...` in the current folder."""
    path = user_path(model)
    name = path.resolve().name if path.exists() else model.replace("/", "__")
    return Path("eval_results", "-".join([name, *parts]))


def check_at_least(values: dict[str, int | None], least: int) -> None:
    """Refuse numbers that are too small.

    Args:
        values: option (`"num_sequences"`) -> its value, None where it was not given.
        least: the smallest number.

    Raises:
        UserError: one is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")
