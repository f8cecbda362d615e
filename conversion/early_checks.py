"""Checks of arguments before torch is imported, so that most mistakes are reported without delay.

The functions that do the work repeat these checks.
"""

from __future__ import annotations

from ..checkpoints.other_forms import check_form_of_folder
from ..checkpoints.source_folder import check_files, find_folder
from ..errors import UserError
from ..utils.paths import user_path
from .output_folder import checked_folders


def check_conversion(source: str, output_dir: str, *, overwrite: bool, revision: str | None) -> None:
    """Check the paths among the arguments of `retrofit` or `restore`.

    Args:
        source: folder or Hub id of the checkpoint.
        output_dir: the folder to create.
        overwrite: whether it may replace a checkpoint.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: if the source or one of its files is missing, or the output cannot be created.
    """
    folder, _, _ = checked_folders(source, output_dir, overwrite=overwrite, revision=revision)
    check_files(folder)


def check_import(source: str, output_dir: str, *, overwrite: bool, revision: str | None) -> None:
    """Check the paths among the arguments of `import_checkpoint`.

    Args:
        source: folder or Hub id of the checkpoint.
        output_dir: the folder to create.
        overwrite: whether it may replace a checkpoint.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: if the source or one of its files is missing or must be converted first, or the output cannot be
            created.
    """
    folder, _, _ = checked_folders(source, output_dir, overwrite=overwrite, revision=revision)
    check_form_of_folder(folder)
    check_files(folder)


def check_comparison(source: str, retrofitted: str, *, revision: str | None) -> None:
    """Check the paths among the arguments of `verify`.

    Args:
        source: folder or Hub id of the stock checkpoint.
        retrofitted: folder of the retrofitted checkpoint.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: if a checkpoint or one of its files is missing.
    """
    output = user_path(retrofitted)
    if not output.is_dir():
        raise UserError(f"{retrofitted}: no such folder.")
    for folder in (find_folder(source, revision)[0], output):
        check_files(folder)
