"""Checks of a checkpoint folder that do not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.checkpoint_files import read_json
from ..utils.paths import user_path


def usable_device(named: str | None) -> str:
    """Return the requested device, or by default a GPU if one is available.

    Raises:
        UserError: If torch cannot use the device.
    """
    import torch

    from ..checkpoints.devices import check_device

    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def written_limit(folder: Path) -> int | None:
    """Return `max_position_embeddings` as written in a config.json; None if only the class has a default."""
    config = read_json(folder / "config.json")
    for part in (config.get("text_config"), config):
        limit = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def is_local(source: str) -> bool:
    """Return whether a model source is a local folder rather than a Hub id."""
    return user_path(source).is_dir()


def default_run_folder(model: str, parts: Sequence[str]) -> Path:
    """Return `eval_results/<model>-<suite>...` in the current folder."""
    path = user_path(model)
    name = path.resolve().name if path.exists() else model.replace("/", "__")
    return Path("eval_results", "-".join([name, *parts]))


def fingerprint(folder: Path) -> str:
    """Hash a checkpoint or adapter: small files and code by content, weight files by name, size and mtime."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
