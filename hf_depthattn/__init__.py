"""Attention Residuals and Mixture-of-Depths Attention for any transformers decoder.

Importing this package registers the model type `depthattn` with transformers' Auto classes, as soon as those are
imported. Everything else is imported on first use, so that importing the package is fast.
"""

import os

# In a source checkout or an editable install, the folders of the sub-packages `kernels`, `conversion` and `eval` are
# next to this package instead of inside it (pyproject.toml maps them into wheels).
_package_folder = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_package_folder, "kernels")):
    __path__.append(os.path.dirname(_package_folder))

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations.auto_classes import register_when_imported

if TYPE_CHECKING:
    from .configuration_depthattn import DepthAttnConfig
    from .conversion.retrofit import retrofit
    from .host_layouts import supported_hosts
    from .integrations.peft import lora_config
    from .integrations.trainer import depth_param_groups
    from .modeling_depthattn import (
        DepthAttnForCausalLM,
        DepthAttnForQuestionAnswering,
        DepthAttnForSequenceClassification,
        DepthAttnForTokenClassification,
        DepthAttnModel,
    )

__version__ = "0.1.0"

__all__ = [
    "DepthAttnConfig",
    "DepthAttnForCausalLM",
    "DepthAttnForQuestionAnswering",
    "DepthAttnForSequenceClassification",
    "DepthAttnForTokenClassification",
    "DepthAttnModel",
    "depth_param_groups",
    "lora_config",
    "retrofit",
    "supported_hosts",
]

_HOME_OF_NAME = {
    "DepthAttnConfig": ".configuration_depthattn",
    "DepthAttnForCausalLM": ".modeling_depthattn",
    "DepthAttnForQuestionAnswering": ".modeling_depthattn",
    "DepthAttnForSequenceClassification": ".modeling_depthattn",
    "DepthAttnForTokenClassification": ".modeling_depthattn",
    "DepthAttnModel": ".modeling_depthattn",
    "depth_param_groups": ".integrations.trainer",
    "lora_config": ".integrations.peft",
    "retrofit": ".conversion.retrofit",
    "supported_hosts": ".host_layouts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF_NAME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register_when_imported()
