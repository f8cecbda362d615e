"""Default `target_modules` of PEFT for our models: those of the host.

For every method, PEFT has a table of default targets by model type. It calls `to_dict` of the model's config just
before it looks up the model type, so `to_dict` registers the host's targets under our model type.
"""

from importlib import import_module
from typing import Any

from .after_import import call_after_import

# For hosts without an entry: the usual targets, query and value projections, under all names that they have in hosts
# (separate projections, fused projections, multi-head latent attention).
_DEFAULT_TARGETS = ["q_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"]
_USUAL_CHOICE = ["q_proj", "v_proj"]

_TABLES = "peft.utils.constants"


def register_default_targets(model_type: str, host_model_type: str) -> None:
    """Register the host's default targets for our model type in PEFT's tables, now or when PEFT is imported.

    Args:
        model_type: our model type.
        host_model_type: the host's model type.
    """

    def register() -> None:
        for name, table in vars(import_module(_TABLES)).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
                targets = _targets_in(table, host_model_type)
                if targets is None:
                    table.pop(model_type, None)
                else:
                    table[model_type] = targets

    # Importing PEFT here would take seconds.
    call_after_import(_TABLES, register)


def _targets_in(table: dict[str, Any], host_model_type: str) -> Any:
    if host_model_type in table:
        return table[host_model_type]
    return _DEFAULT_TARGETS if table.get("llama") == _USUAL_CHOICE else None
