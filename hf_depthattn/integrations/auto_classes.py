"""Registration of the model type `depthattn` with transformers' Auto classes, without importing torch or model code.

The public `AutoModelX.register(config, model)` needs the classes, whose import takes seconds. The tables behind it can
hold names instead: transformers then imports a class on first use, as for its own models. Registering by name also
adds the model type to `MODEL_FOR_..._MAPPING_NAMES`, from which pipelines, Trainer and transformers' tests read which
tasks a model type supports.

The modules of the tables are slow to import too, so names are registered when something else imports those modules:
`import hf_depthattn` and `depthattn --help` do not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from ..after_import import call_after_import

# Copies of the names in `DepthAttnConfig` and `AUTO_MAP`; tests/packaging/test_packages.py compares them.
_MODEL_TYPE, _CONFIG_CLASS = "depthattn", "DepthAttnConfig"
_MODEL_CLASSES = {
    "AutoModel": "DepthAttnModel",
    "AutoModelForCausalLM": "DepthAttnForCausalLM",
    "AutoModelForSequenceClassification": "DepthAttnForSequenceClassification",
    "AutoModelForTokenClassification": "DepthAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "DepthAttnForQuestionAnswering",
}

# Private tables of transformers' mappings in which names are registered: by model type, by config class, and the
# modules from which classes are imported.
_CONFIG_TABLES = ("_mapping", "_modules")
_MODEL_TABLES = ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules")


def register_auto_classes() -> None:
    """Register the config with AutoConfig and every model class with its Auto class; can be called repeatedly."""
    _register_config()
    _register_models()


def register_when_imported() -> None:
    """Register the model type as soon as the Auto classes are imported: immediately if they already are."""
    for name, register in _TABLE_MODULES.items():
        call_after_import(name, register)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if _has_tables(CONFIG_MAPPING, _CONFIG_TABLES):
        CONFIG_MAPPING._mapping[_MODEL_TYPE] = _CONFIG_CLASS
        CONFIG_MAPPING._modules[_MODEL_TYPE] = _this_package()
    else:
        AutoConfig.register(_MODEL_TYPE, getattr(_this_package(), _CONFIG_CLASS), exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto import modeling_auto

    for auto_name, class_name in _MODEL_CLASSES.items():
        auto_class = getattr(modeling_auto, auto_name)
        mapping = auto_class._model_mapping
        if _has_tables(mapping, _MODEL_TABLES):
            mapping._config_mapping[_MODEL_TYPE] = _CONFIG_CLASS
            mapping._reverse_config_mapping[_CONFIG_CLASS] = _MODEL_TYPE
            mapping._model_mapping[_MODEL_TYPE] = class_name
            mapping._modules[_MODEL_TYPE] = _this_package()
        else:
            config_class = getattr(_this_package(), _CONFIG_CLASS)
            auto_class.register(config_class, getattr(_this_package(), class_name), exist_ok=True)


#: Module of transformers -> the function that registers in its tables.
_TABLE_MODULES: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


def _has_tables(mapping: Any, tables: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(mapping, table, None), dict) for table in tables)


def _this_package() -> ModuleType:
    """Return this package, whose import may not have finished."""
    return import_module(__name__.partition(".")[0])
