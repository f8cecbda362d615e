"""What PEFT adapts when its config names no `target_modules`: what it adapts in the host.

PEFT has a table by model type for every method and none of them knows ours. It asks a model's config for its dict just
before it looks there, so that is when the host's entries are entered under our model type.
"""

import sys
from typing import Any

# For hosts that PEFT has no entry for: its usual choice, under the names it has in all hosts: separate, fused, and
# multi-head latent attention.
_DEFAULT_TARGETS = ["q_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"]
_USUAL_CHOICE = ["q_proj", "v_proj"]

_TABLES = "peft.utils.constants"


def register_default_targets(model_type: str, host_model_type: str) -> None:
    """Enter our model type into PEFT's tables of default targets, if PEFT is imported.

    Args:
        model_type: our model type.
        host_model_type: the host whose targets it gets.
    """
    # PEFT takes seconds to import, and who has not imported it looks nothing up in its tables.
    if _TABLES not in sys.modules:
        return
    for name, table in vars(sys.modules[_TABLES]).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            targets = _targets_in(table, host_model_type)
            if targets is None:
                table.pop(model_type, None)
            else:
                table[model_type] = targets


def _targets_in(table: dict[str, Any], host_model_type: str) -> Any:
    if host_model_type in table:
        return table[host_model_type]
    return _DEFAULT_TARGETS if table.get("llama") == _USUAL_CHOICE else None
