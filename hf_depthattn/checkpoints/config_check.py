"""Configs that no model has are refused before anything is built from them."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError

# More than any model has: config classes make lists of such lengths, and models so many modules.
_MOST_PARTS = 100_000
_COUNT = re.compile(r"(?:layers|heads|experts|labels)$")


def check_counts(name: str, fields: dict[str, Any]) -> None:
    """Refuse numbers of layers and other parts that no model has, before anything is built from them.

    Args:
        name: how to call the checkpoint in messages.
        fields: its config as a dictionary.

    Raises:
        UserError: naming the field.
    """
    for field, value in fields.items():
        if isinstance(value, dict):
            check_counts(name, value)
        elif isinstance(value, int) and value > _MOST_PARTS and _COUNT.search(field):
            raise UserError(f"{name}: {field}: {value} in its config is more than any model has.")
