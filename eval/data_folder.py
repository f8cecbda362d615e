"""Where the optional local data are: benchmark items and text that are read without a network."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError

ENVIRONMENT_VARIABLE = "DEPTHATTN_DATA"


def data_folder() -> Path:
    """The folder that `DEPTHATTN_DATA` names, else `../shared/data` beside a source checkout.

    Raises:
        UserError: there is no such folder.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        problem = f"{named}: is not a folder" if named else "no local data"
        raise UserError(f"{problem}; name the folder with the local data in {ENVIRONMENT_VARIABLE}.")
    return folder


def data_file(relative: str) -> Path:
    """A file or folder inside the data folder.

    Args:
        relative: its path there, e.g. `"tasks/piqa.jsonl"`.

    Raises:
        UserError: it does not exist.
    """
    path = data_folder() / relative
    if not path.exists():
        raise UserError(f"{path}: missing; {ENVIRONMENT_VARIABLE} must name a folder that holds {relative}.")
    return path
