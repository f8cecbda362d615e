"""Folders that appear complete or not at all, and the weights that go into them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.carried_files import CARRIED_FOLDERS
from ..checkpoints.checkpoint_files import read_chunks, read_json, read_weight_files
from ..errors import UserError
from .folder_lock import dead_siblings, folder_lock, sibling


@dataclass
class ByteCounts:
    """What happened to the bytes of the weights."""

    linked: int = 0
    copied: int = 0
    written: int = 0


@contextmanager
def complete_folder(target: Path, overwrite: bool, *, is_checkpoint: bool = True) -> Iterator[Path]:
    """Write a folder beside `target`, and give it that name when everything is in it.

    Leftovers of runs that were killed are removed first. With `overwrite`, the old folder goes when the new one is
    complete.

    Args:
        target: the folder to create, resolved.
        overwrite: replace an existing checkpoint.
        is_checkpoint: check that the config and all weights are in it before it gets its name.

    Yields:
        The folder to write into.

    Raises:
        UserError: the target cannot be replaced, or the disk refuses (full, no permission).
    """
    check_target(target, overwrite)
    partial = sibling(target, "partial")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(target) as locked:
            if locked:
                _clear_leftovers(target)
            partial.mkdir()
            yield partial
            check_target(target, overwrite)
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


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        UserError: it exists and is not to be overwritten, is more than a checkpoint, or has an odd name.
    """
    if not target.name or Path.cwd().is_relative_to(target):
        raise UserError(f"{target}: holds the current directory; choose another output folder.")
    try:
        target.name.encode()
    except UnicodeEncodeError as error:
        # The model card has the name in it.
        raise UserError(f"{target}: its name is not UTF-8 text; choose another output folder.") from error
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: exists and is not a folder.")
    children = list(target.iterdir())
    if not children:
        return
    if not overwrite:
        raise UserError(f"{target}: exists and is not empty; choose another folder, or overwrite it (--overwrite).")
    if not (target / "config.json").is_file():
        raise UserError(f"{target}: exists and is not a checkpoint (no config.json); it is not overwritten.")
    folders = sorted(child.name for child in children if child.is_dir() and child.name not in CARRIED_FOLDERS)
    if folders:
        raise UserError(f"{target}: has folders in it ({', '.join(folders)}); it is not overwritten.")


def check_apart(target: Path, source: Path) -> None:
    """Refuse an output that is, contains or lies in the source.

    Raises:
        UserError: see above.
    """
    source = source.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"{target}: must lie apart from the source {source}.")


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs left, and bring an old output back that one had moved aside and not yet replaced."""
    for path in dead_siblings(target, "partial"):
        shutil.rmtree(path)
    for path in dead_siblings(target, "replaced"):
        if target.exists():
            shutil.rmtree(path)
        else:
            os.rename(path, target)


def _check_complete(partial: Path, target: Path) -> None:
    """Nothing takes the place of an old output, or gets its name, that somebody has touched meanwhile."""
    try:
        read_json(partial / "config.json")
        read_weight_files(partial)
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{target}: was not written: files went away meanwhile ({error})") from error


def _sync(folder: Path) -> None:
    """Bring a folder to the disk: its name says that it is complete, also after a power failure."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            # Some systems do not sync folders.
            if not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path) -> None:
    """Give the new folder its name; if that fails, the old one has it still."""
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
        _sync_folder_entry(target.parent)


def _sync_folder_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        source: the file; symbolic links (the Hub cache has them) are followed.
        target: its new name.
        counts: receives the number of bytes.
        copy: copy in any case.
        on_bytes: called with the number of bytes after each step.
    """
    # `os.link` would link the symbolic link itself.
    source = source.resolve()
    num_bytes = source.stat().st_size
    if not copy:
        try:
            os.link(source, target)
        except OSError:
            # Another file system, one without links, or a source of another user.
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
