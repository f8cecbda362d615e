"""Find the optional local data: benchmark items and texts for evaluation without network access."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError

ENVIRONMENT_VARIABLE = "DEPTHATTN_DATA"


def data_folder() -> Path:
    """Return the folder that `DEPTHATTN_DATA` names, or `../shared/data` next to a source checkout.

    Raises:
        UserError: if the folder does not exist.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        problem = f"{named}: is not a folder" if named else "no local data found"
        raise UserError(f"{problem}; set {ENVIRONMENT_VARIABLE} to the folder with the local data.")
    return folder


def data_file(relative: str) -> Path:
    """Return the path of a file or folder inside the data folder.

    Args:
        relative: path relative to the data folder, e.g. `"tasks/piqa.jsonl"`.

    Raises:
        UserError: if the path does not exist.
    """
    path = data_folder() / relative
    if not path.exists():
        raise UserError(f"{path}: missing; {ENVIRONMENT_VARIABLE} must name a folder that contains {relative}.")
    return path
