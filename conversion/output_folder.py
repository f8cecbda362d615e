"""Output folders that are created only when they are complete, and placing weight files in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.carried_files import CARRIED_FOLDERS, EVAL_RESULTS_FOLDER
from ..checkpoints.checkpoint_files import read_chunks, read_json, read_weight_files
from ..checkpoints.source_folder import find_folder
from ..errors import UserError
from ..utils.paths import user_path
from ..utils.result_files import sync_folder
from .folder_lock import dead_siblings, folder_lock, sibling

#: The config of a checkpoint.
CONFIG_FILE = "config.json"


@dataclass
class ByteCounts:
    """Number of bytes of weights that were linked, copied and written."""

    linked: int = 0
    copied: int = 0
    written: int = 0


@contextmanager
def complete_folder(
    target: Path, overwrite: bool, *, is_checkpoint: bool = True, config_file: str = CONFIG_FILE
) -> Iterator[Path]:
    """Write a temporary folder beside `target`, and rename it to `target` when it is complete.

    Leftovers of killed runs are removed first. With `overwrite`, the old folder is removed after the new one is
    complete.

    Args:
        target: the folder to create, an absolute path.
        overwrite: replace an existing checkpoint.
        is_checkpoint: check that it contains a config and all weights before it is renamed.
        config_file: as in `check_target`.

    Yields:
        The folder to write into.

    Raises:
        UserError: if the target cannot be replaced or writing fails (disk full, no permission).
    """
    check_target(target, overwrite, config_file)
    partial = sibling(target, "partial")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(target) as locked:
            if locked:
                _clear_leftovers(target)
            partial.mkdir()
            yield partial
            check_target(target, overwrite, config_file)
            if is_checkpoint:
                _check_complete(partial, target)
            _sync(partial)
            _swap(partial, target)
            new_parents = []
    except OSError as error:
        problem = f"{error.filename or target}: {error.strerror or error}"
        raise UserError(f"{problem}; {target} was not written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()


def check_target(target: Path, overwrite: bool, config_file: str = CONFIG_FILE) -> None:
    """Check that an output folder can be created or replaced.

    Args:
        target: the folder, an absolute path.
        overwrite: replace an existing checkpoint.
        config_file: a file without which an existing folder is not replaced.

    Raises:
        UserError: if it exists and may not be overwritten, contains more than a checkpoint, or has an invalid name.
    """
    if not target.name or Path.cwd().is_relative_to(target):
        raise UserError(f"{target}: contains the current directory; choose another output folder.")
    try:
        target.name.encode()
    except UnicodeEncodeError as error:
        # The model card contains the name.
        raise UserError(f"{target}: its name is not UTF-8 text; choose another output folder.") from error
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a folder.")
    children = list(target.iterdir())
    if not children:
        return
    if not overwrite:
        raise UserError(
            f"{target}: exists and is not empty; choose another folder, or overwrite it (`overwrite=True`, "
            "--overwrite)."
        )
    if not (target / config_file).is_file():
        what = "a checkpoint" if config_file == CONFIG_FILE else "an adapter"
        raise UserError(f"{target}: exists and is not {what} (no {config_file}); it is not overwritten.")
    allowed = (*CARRIED_FOLDERS, EVAL_RESULTS_FOLDER)
    folders = sorted(child.name for child in children if child.is_dir() and child.name not in allowed)
    if folders:
        raise UserError(f"{target}: contains folders ({', '.join(folders)}); it is not overwritten.")


def check_apart(target: Path, source: Path) -> None:
    """Check that the output folder and the source do not contain each other.

    Args:
        target: the output folder, an absolute path.
        source: the source.

    Raises:
        UserError: if they do.
    """
    source = source.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"{target}: must not contain the source {source} or be inside it; choose another folder.")


def checked_folders(
    source: str | Path, output_dir: str | Path, *, overwrite: bool, revision: str | None
) -> tuple[Path, str | None, Path]:
    """Find the folder of a checkpoint, and check the output folder of its conversion.

    Args:
        source: folder or Hub id of the checkpoint.
        output_dir: the folder to create.
        overwrite: replace an existing checkpoint.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The folder of the source, its Hub id if it is from the Hub, and the output folder as an absolute path.

    Raises:
        UserError: if there is no such source, or as in `check_target` and `check_apart`.
    """
    target = user_path(output_dir).resolve()
    check_target(target, overwrite)
    folder, hub_id = find_folder(source, revision)
    check_apart(target, folder)
    return folder, hub_id, target


def _clear_leftovers(target: Path) -> None:
    """Remove leftovers of killed runs; restore an old output that was moved away but not yet replaced."""
    for path in dead_siblings(target, "partial"):
        shutil.rmtree(path)
    for path in dead_siblings(target, "replaced"):
        if target.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, target)


def _check_complete(partial: Path, target: Path) -> None:
    """Check that the new checkpoint is complete: another program may have removed files while it was written."""
    try:
        read_json(partial / CONFIG_FILE)
        read_weight_files(partial)
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{target}: was not written: files were removed meanwhile ({error})") from error


def _sync(folder: Path) -> None:
    """Flush a folder to disk before it gets its name, so that it is complete even after a power failure."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            # Some systems cannot sync folders.
            if not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    """Rename the new folder; if that fails, keep the old one."""
    replaced = sibling(target, "replaced")
    try:
        if target.exists():
            os.rename(target, replaced)
        os.rename(partial, target)
    except BaseException:
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(OSError):
        sync_folder(target.parent)


def place_weights(
    source: Path,
    target: Path,
    counts: ByteCounts,
    *,
    copy: bool = False,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Hard-link a weight file, or copy it where links are not possible.

    Args:
        source: the file; symbolic links, as in the Hub cache, are followed.
        target: path of the link or copy.
        counts: its counters are increased.
        copy: always copy.
        on_bytes: called with the number of bytes after each step.
    """
    # `os.link` would link the symbolic link itself.
    source = source.resolve()
    num_bytes = source.stat().st_size
    if not copy:
        try:
            os.link(source, target)
        except OSError:
            # The target is on another file system, hard links are not supported, or the source is another user's.
            copy = True
    if not copy:
        counts.linked += num_bytes
        if on_bytes is not None:
            on_bytes(num_bytes)
        return
    with open(target, "wb") as file:
        for chunk in read_chunks(source):
            file.write(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    counts.copied += num_bytes
