"""What a command looks at before it imports torch: most mistakes are found here, at once.

The functions that do the work look again; what is in this file only makes the answer come earlier.
"""

from __future__ import annotations

from ..checkpoints.source_folder import check_files, find_folder
from ..errors import UserError
from ..utils.paths import user_path
from .output_folder import check_apart, check_target


def check_conversion(source: str, output_dir: str, *, overwrite: bool, revision: str | None) -> None:
    """Refuse arguments of `retrofit` or `restore` that cannot be right.

    Args:
        source: the checkpoint, as the user named it.
        output_dir: the folder to create.
        overwrite: whether it may replace a checkpoint.
        revision: of a Hub repository.

    Raises:
        UserError: folders or files that are not there, or are in the way; the message is one line.
    """
    target = user_path(output_dir).resolve()
    check_target(target, overwrite)
    folder, _ = find_folder(source, revision)
    check_apart(target, folder)
    check_files(folder)


def check_comparison(source: str, retrofitted: str, *, revision: str | None) -> None:
    """Refuse arguments of `verify` that cannot be right.

    Args:
        source: the stock checkpoint, as the user named it.
        retrofitted: the retrofitted one.
        revision: of a Hub repository.

    Raises:
        UserError: see `check_conversion`.
    """
    output = user_path(retrofitted)
    if not output.is_dir():
        raise UserError(f"{retrofitted}: no such folder.")
    for folder in (find_folder(source, revision)[0], output):
        check_files(folder)
