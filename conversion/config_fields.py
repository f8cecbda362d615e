"""Fields of configs as plain data, apart from the config classes, which need torch."""

from __future__ import annotations

import re
from typing import Any

from hf_depthattn.conversion.checkpoint_files import ConversionError

#: Fields of `DepthAttnConfig` that can be given to `retrofit`.
CONFIG_FIELDS = (
    "connection",
    "num_blocks",
    "sublayers_per_block",
    "read_scale",
    "query",
    "depth_activation",
    "key_norm",
    "static_mix",
    "num_depth_heads",
    "depth_window",
    "depth_norm_eps",
    "depth_kv",
    "depth_key_rope",
    "depth_key_norm",
    "depth_gate",
    "num_depth_slots",
    "norm_position",
)

# More than any model has: config classes make lists of such lengths, and models so many modules.
_MOST_PARTS = 100_000
_COUNT = re.compile(r"(?:layers|heads|experts|labels)$")

#: Those of MoDA that mean nothing without `depth_kv`.
DEPTH_KV_OPTIONS = ("depth_gate", "depth_key_rope", "depth_key_norm", "num_depth_slots")


def check_counts(name: str, fields: dict[str, Any]) -> None:
    """Refuse numbers of layers and other parts that no model has, before anything is built from them.

    Args:
        name: how to call the checkpoint in messages.
        fields: its config as a dictionary.

    Raises:
        ConversionError: naming the field.
    """
    for field, value in fields.items():
        if isinstance(value, dict):
            check_counts(name, value)
        elif isinstance(value, int) and value > _MOST_PARTS and _COUNT.search(field):
            raise ConversionError(f"{name}: {field}: {value} in its config is more than any model has.")
