"""Paths given by users, and a check of symbolic links."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def user_path(path: str | Path) -> Path:
    """Return a path with `~` expanded.

    Args:
        path: the path, as given by the user.

    Raises:
        UserError: if the user in `~user` does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such user.") from error


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Args:
        path: the path, as given by the user.

    Raises:
        UserError: if the file cannot be read, or is not UTF-8 text.
    """
    try:
        return user_path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def check_inside(path: Path, folder: Path) -> None:
    """Check that a file of a checkpoint is not a symbolic link to a file outside the checkpoint.

    Files are copied to the output, which may be published: a downloaded repository must not be able to include other
    files of this computer. Links of the Hub cache into its own blob folders are allowed.

    Args:
        path: a file in the folder.
        folder: the checkpoint.

    Raises:
        UserError: if the link points outside the folder.
    """
    home, target = folder.resolve(), path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (home, *_hub_stores(home))):
        raise UserError(f"{path}: is a link to {target}, outside of {folder}; replace it by the file itself.")


def _hub_stores(folder: Path) -> list[Path]:
    """Return the blob folders for a snapshot in the Hub cache.

    For `CACHE/models--OWNER--NAME/snapshots/COMMIT` these are `CACHE/models--OWNER--NAME/blobs` and `CACHE/blobs`,
    which all repositories share.
    """
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and "--" in repository.name:
            return [repository / "blobs", repository.parent / "blobs"]
    return []
