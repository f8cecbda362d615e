"""What the arguments of `eval` and `report` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_depthattn.conversion.checkpoint_files import ConversionError


def usable_device(named: str | None) -> str:
    """The device that was asked for, else a GPU if there is one.

    Raises:
        ConversionError: torch cannot use it here.
    """
    import torch

    from hf_depthattn.conversion.devices import check_device

    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def local_path(source: str) -> Path:
    """A source as a path; `~` is the home folder."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        # `~nosuchuser` is a name like any other.
        return Path(source)


def is_local(source: str) -> bool:
    """Whether a source is a folder of this machine, not a Hub id."""
    return local_path(source).is_dir()


def default_run_folder(model: str, parts: Sequence[str]) -> Path:
    """`eval_results/<model>-<suite>...` in the current folder."""
    path = local_path(model)
    name = path.resolve().name if path.exists() else model.replace("/", "__")
    return Path("eval_results", "-".join([name, *parts]))


def check_at_least(values: dict[str, int | None], least: int) -> None:
    """Refuse numbers that are too small.

    Args:
        values: option (`"num_sequences"`) -> its value, None where it was not given.
        least: the smallest number.

    Raises:
        ConversionError: one is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise ConversionError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")
