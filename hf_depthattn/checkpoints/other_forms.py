"""Checkpoints that are not a folder with safetensors weights, and how to make one of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .adapter_files import ADAPTER_CONFIG
from .checkpoint_files import INDEX_FILE, SINGLE_FILE

# Where a distributed checkpoint of OLMo-core or torch has its names and offsets, a pickle.
_METADATA = ("model_and_optim/.metadata", ".metadata")
# Number of folders in a message.
_MOST_SHOWN = 5
# What is looked for in a local folder.
_PATTERNS = ("*", *_METADATA, "*/config.json", "*/*/config.json")


def check_form_of_folder(folder: Path) -> None:
    """Check that a local folder is not a checkpoint in a form that must be converted to safetensors first.

    Args:
        folder: the folder.

    Raises:
        UserError: if it is; the message says how.
    """
    files = {path.relative_to(folder).as_posix() for pattern in _PATTERNS for path in folder.glob(pattern)}
    _check_form(str(folder), files, folder)


def check_form_of_repository(hub_id: str, files: Iterable[str]) -> None:
    """Check the same of a repository of the Hub, by the names of its files.

    Args:
        hub_id: its id.
        files: paths of all its files.

    Raises:
        UserError: if its checkpoint must be converted first, or it has several in folders; the message says how.
    """
    _check_form(hub_id, set(files), None)


def _check_form(name: str, files: set[str], folder: Path | None) -> None:
    if SINGLE_FILE in files or INDEX_FILE in files:
        return
    if metadata := next((file for file in _METADATA if file in files), None):
        first = "Convert it where it was trained" if folder else f"Download it ({_download(name)}), convert it"
        shards = (folder or Path("FOLDER")) / PurePosixPath(metadata).parent
        raise UserError(
            f"{name}: is a distributed checkpoint, whose names and offsets are in a pickle. {first}, and copy "
            "config.json to the result: from olmo_core.distributed.checkpoint import unshard_checkpoint; "
            f"unshard_checkpoint({str(shards)!r}, NEW_FOLDER, use_safetensors=True)"
        )
    folders = sorted(str(PurePosixPath(file).parent) for file in files if file.endswith("/config.json"))
    if folders and not files & {"config.json", ADAPTER_CONFIG}:
        shown = ", ".join([*folders[:_MOST_SHOWN], *(["..."] if len(folders) > _MOST_SHOWN else [])])
        download = "" if folder else f", downloaded: {_download(name, f'{folders[0]}/*')}"
        raise UserError(
            f"{name}: has no config.json, but folders in it have one ({shown}); give one of them{download}"
        )
    if pickles := sorted(file for file in files if file.endswith(".pt") and "/" not in file):
        raise UserError(
            f"{name}: has only a pickle ({pickles[0]}). Save its tensors as {SINGLE_FILE}, beside a config.json; "
            "docs/importing.md has the code."
        )


def _download(hub_id: str, pattern: str | None = None) -> str:
    """Return the command that downloads a repository, or files of it."""
    return f"hf download {hub_id}{f' --include {pattern!r}' if pattern else ''} --local-dir FOLDER"
