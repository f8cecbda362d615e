"""Checks of arguments that several commands share."""

from __future__ import annotations

from ..errors import UserError


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
