"""Paths that users name, and links in the folders that they name."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def user_path(path: str | Path) -> Path:
    """A path with its `~` replaced.

    Args:
        path: as the user wrote it.

    Raises:
        UserError: `~name` of a user who does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such user.") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file that a user named; a byte-order mark is no part of it.

    Args:
        path: as the user wrote it.

    Raises:
        UserError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        return user_path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file of a checkpoint that is a link to a file of something else.

    What is copied goes wherever the output goes: a repository that somebody downloaded and passes on must not take
    other files of the machine along. The cache of the Hub links into stores of its own, which are allowed.

    Args:
        path: a file in the folder.
        folder: the checkpoint.

    Raises:
        UserError: the link leads outside of the folder.
    """
    home, target = folder.resolve(), path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (home, *_hub_stores(home))):
        raise UserError(f"{path}: is a link to {target}, outside of {folder}; put the file itself there.")


def _hub_stores(folder: Path) -> list[Path]:
    """Where the files of a snapshot in the Hub's cache lie.

    That is `CACHE/models--OWNER--NAME/blobs` for `CACHE/models--OWNER--NAME/snapshots/COMMIT`, and `CACHE/blobs`,
    which repositories of one cache share.
    """
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and "--" in repository.name:
            return [repository / "blobs", repository.parent / "blobs"]
    return []
