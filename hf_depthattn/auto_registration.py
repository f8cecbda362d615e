"""Registers the model type `depthattn` with transformers' Auto classes without importing any modelling code.

The public `AutoModelX.register(config, model)` needs the model classes, and importing those costs two seconds. The
tables behind it can hold names instead: transformers then fetches the class from a module when it first needs it, as
it does for its own models. Entering the names has a second effect: pipelines, Trainer and upstream's tests decide by
`MODEL_FOR_..._MAPPING_NAMES` what a model type can do.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import AutoConfig

from .configuration_depthattn import DepthAttnConfig
from .remote_code import AUTO_MAP

# What a mapping of transformers must have so that a name can be entered: the tables by model type and by config class,
# and the modules from which it fetches classes.
_NAME_TABLES = ("_config_mapping", "_reverse_config_mapping", "_model_mapping", "_modules")


def register_auto_classes() -> None:
    """Registers the config with AutoConfig and every model class with its Auto class; repeating it changes nothing."""
    AutoConfig.register(DepthAttnConfig.model_type, DepthAttnConfig, exist_ok=True)
    for auto_name, reference in AUTO_MAP.items():
        if auto_name == "AutoConfig":
            continue
        class_name = reference.rpartition(".")[2]
        auto_class = getattr(modeling_auto, auto_name)
        if all(isinstance(getattr(auto_class._model_mapping, table, None), dict) for table in _NAME_TABLES):
            _enter_name(auto_class._model_mapping, class_name)
        else:
            auto_class.register(DepthAttnConfig, getattr(_this_package(), class_name), exist_ok=True)


def _enter_name(mapping: Any, class_name: str) -> None:
    model_type = DepthAttnConfig.model_type
    mapping._config_mapping[model_type] = DepthAttnConfig.__name__
    mapping._reverse_config_mapping[DepthAttnConfig.__name__] = model_type
    mapping._model_mapping[model_type] = class_name
    mapping._modules[model_type] = _this_package()


def _this_package() -> Any:
    return sys.modules.get(__package__) or import_module(__package__)
