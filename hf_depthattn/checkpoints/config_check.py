"""Check a config for absurd sizes before a model is built from it."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError

# Larger than in any model: config classes create lists of such lengths, and models as many modules.
_MOST_PARTS = 100_000
_COUNT = re.compile(r"(?:layers|heads|experts|labels)$")


def check_counts(name: str, fields: dict[str, Any]) -> None:
    """Check the numbers of layers, heads, experts and labels in a config.

    Args:
        name: name of the checkpoint in messages.
        fields: its config as a dict.

    Raises:
        UserError: if one is larger than in any model.
    """
    for field, value in fields.items():
        if isinstance(value, dict):
            check_counts(name, value)
        elif isinstance(value, int) and value > _MOST_PARTS and _COUNT.search(field):
            raise UserError(f"{name}: {field}: {value} in its config is more than any model has.")
