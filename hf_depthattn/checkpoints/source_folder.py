"""Find the folder of a checkpoint, local or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..utils.paths import user_path
from .adapter_files import check_no_adapter
from .carried_files import CARRIED_FOLDERS, CARRIED_PATTERNS
from .checkpoint_files import INDEX_FILE, SINGLE_FILE, read_json, read_weight_files, read_weight_map
from .other_forms import check_form_of_repository

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_folder(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint, downloading it from the Hub if needed.

    Args:
        source: a local folder, or a Hub id (`owner/name`).
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The folder, and the Hub id or `None` for a local folder.

    Raises:
        UserError: if there is no such folder or Hub repository, or the download fails.
    """
    if not str(source).strip():
        raise UserError("source: is empty; give a folder or a Hub id.")
    folder = user_path(source)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision: {revision!r} is only allowed for a Hub id, not for the local folder {folder}.")
        return folder, None
    name = str(source)
    if folder.exists():
        raise UserError(f"{name}: is a file; give the checkpoint folder.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such folder.")
    return _download(name, revision), name


def find_checkpoint(source: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint after checking its files, without importing torch.

    Args:
        source: a local folder, or a Hub id (`owner/name`).
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: if there is no such folder, it contains an adapter, or a file is missing or damaged.
    """
    folder, _ = find_folder(source, revision)
    check_files(folder, source)
    return folder


def check_files(folder: Path, name: str | None = None) -> None:
    """Check the files of a checkpoint, to report most mistakes early.

    Args:
        folder: the checkpoint.
        name: its name in messages; the folder by default.

    Raises:
        UserError: if it is an adapter, or its config or a weight file is missing or damaged.
    """
    check_no_adapter(folder, name)
    read_json(folder / "config.json")
    read_weight_files(folder)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    chat_templates = [f"{folder}/*" for folder in CARRIED_FOLDERS]
    small_files = [*CARRIED_PATTERNS, *chat_templates, "README.md", "*.py"]
    # `*` also matches files in sub-folders, in which repositories have other formats.
    elsewhere = ["original/*", "onnx/*", "gguf/*", "openvino/*", "coreml/*", "checkpoint-*/*"]
    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=small_files, ignore_patterns=elsewhere)
        )
        index = folder / INDEX_FILE
        if not index.is_file() and (files := _files_of(hub_id, revision)):
            check_form_of_repository(hub_id, files)
            if SINGLE_FILE not in files:
                # There are no weights to download, which is an error of the checks that follow.
                return folder
        shards = [SINGLE_FILE, *(sorted(set(read_weight_map(index).values())) if index.is_file() else ())]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=shards))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{hub_id}: neither a local folder nor available on the Hub: {reason}") from error


def _files_of(hub_id: str, revision: str | None) -> list[str]:
    """Return the paths of all files of a repository; none if the Hub cannot be asked and its cache is used."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(hub_id, revision=revision)
    except Exception:
        # HTTP clients raise errors of their own; what is missing is reported without the list, too.
        return []
