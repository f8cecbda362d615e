"""Checks of arguments that several commands share."""

from __future__ import annotations

from ..errors import UserError

#: Dtypes in which a model can be run, by their names in torch.
DTYPES = ("float32", "bfloat16", "float16")
#: Value of `--dtype` and `--batch-size` that leaves the choice to the checkpoint or the program.
AUTO = "auto"


def check_dtype(dtype: str, allowed: tuple[str, ...] = DTYPES) -> None:
    """Check the name of a dtype.

    Args:
        dtype: the name.
        allowed: the allowed names.

    Raises:
        UserError: if it is not one of them.
    """
    if dtype not in allowed:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(allowed)}.")


def check_batch_size(batch_size: int | str) -> None:
    """Check a batch size, which may be `"auto"`.

    Raises:
        UserError: if it is neither a positive number nor `"auto"`.
    """
    if batch_size != AUTO and not (isinstance(batch_size, int) and batch_size >= 1):
        raise UserError(f"--batch-size {batch_size}: must be at least 1, or auto.")


def check_at_least(values: dict[str, int | None], least: int) -> None:
    """Check that options have a minimum value.

    Args:
        values: name of an option (`"num_sequences"`) -> its value, or `None` if it was not given.
        least: the smallest allowed value.

    Raises:
        UserError: if a value is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")
