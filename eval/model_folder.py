"""The checkpoint that a command is given, looked at before torch is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.checkpoint_files import read_json
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


def fingerprint(folder: Path) -> str:
    """Of a checkpoint or an adapter: its small files and its code by content, its weights by name, size and time."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
