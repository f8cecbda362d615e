"""Registers the model type `depthattn` with transformers' Auto classes, without importing torch or any modelling code.

The public `AutoModelX.register(config, model)` needs the classes, and importing those costs seconds. The tables behind
it can hold names instead: transformers then fetches a class from a module when it first needs it, as it does for its
own models. Entering the names has a second effect: pipelines, Trainer and upstream's tests decide by
`MODEL_FOR_..._MAPPING_NAMES` what a model type can do.

The tables themselves belong to modules whose import costs as much, so names are entered when somebody imports those:
`import hf_depthattn` and `depthattn --help` do not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from ..after_import import call_after_import

# As `DepthAttnConfig` and `AUTO_MAP` have them; tests/packaging/test_packages.py compares.
_MODEL_TYPE, _CONFIG_CLASS = "depthattn", "DepthAttnConfig"
_MODEL_CLASSES = {
    "AutoModel": "DepthAttnModel",
    "AutoModelForCausalLM": "DepthAttnForCausalLM",
    "AutoModelForSequenceClassification": "DepthAttnForSequenceClassification",
    "AutoModelForTokenClassification": "DepthAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "DepthAttnForQuestionAnswering",
}

# What a mapping of transformers must have so that a name can be entered: the tables by model type and by config class,
# and the modules from which it fetches classes.
_CONFIG_TABLES = ("_mapping", "_modules")
_MODEL_TABLES = ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules")


def register_auto_classes() -> None:
    """Registers the config with AutoConfig and every model class with its Auto class; repeating it changes nothing."""
    _register_config()
    _register_models()


def register_when_imported() -> None:
    """Registers as soon as the Auto classes are imported, which is now if they are already."""
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


#: Where the tables are.
_TABLE_MODULES: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


def _has_tables(mapping: Any, tables: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(mapping, table, None), dict) for table in tables)


def _this_package() -> ModuleType:
    """The package, which may be in the middle of its own import."""
    return import_module(__name__.partition(".")[0])
