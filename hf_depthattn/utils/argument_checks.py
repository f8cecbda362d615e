"""Checks of command-line arguments that several commands make."""

from __future__ import annotations

from ..errors import UserError


def check_at_least(values: dict[str, int | None], least: int) -> None:
    """Refuse numbers that are too small.

    Args:
        values: option (`"num_sequences"`) -> its value, None where it was not given.
        least: the smallest number.

    Raises:
        UserError: one is smaller.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}.")
