"""Default `target_modules` of PEFT for our models: those of the host.

For every method, PEFT has a table of default targets by model type. It calls `to_dict` of the model's config just
before it looks up the model type, so `to_dict` registers the host's targets under our model type.
"""

import sys
from typing import Any

# For hosts without an entry: the usual targets, query and value projections, under all names that they have in hosts
# (separate projections, fused projections, multi-head latent attention).
_DEFAULT_TARGETS = ["q_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"]
_USUAL_CHOICE = ["q_proj", "v_proj"]

_TABLES = "peft.utils.constants"


def register_default_targets(model_type: str, host_model_type: str) -> None:
    """Register the host's default targets for our model type in PEFT's tables, if PEFT has been imported.

    Args:
        model_type: our model type.
        host_model_type: the host's model type.
    """
    # PEFT calls `to_dict` once it is imported; importing it here would take seconds wherever a config is printed.
    tables = sys.modules.get(_TABLES)
    if tables is None:
        return
    for name, table in vars(tables).items():
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
