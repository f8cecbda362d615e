"""Liger kernels for the modules of the host: `use_liger_kernel=True` of `TrainingArguments`.

Liger has one function per model type that patches a model. Our models have the structure of their host, so this file
registers a function for the model type `depthattn` that calls the one for the host. Sites and MoDA are not patched.

The function is registered when Liger is first imported: importing Liger here would take seconds, and `Trainer` imports
it just before it looks up the model type.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformers.utils import logging

from .after_import import call_after_import
from .configuration_depthattn import DepthAttnConfig

logger = logging.get_logger(__name__)

_LIGER_MODULE = "liger_kernel.transformers.monkey_patch"


def register_with_liger() -> None:
    """Register our model type with Liger, as soon as Liger is imported."""
    call_after_import(_LIGER_MODULE, _enter)


def _enter() -> None:
    table = getattr(import_module(_LIGER_MODULE), "MODEL_TYPE_TO_APPLY_LIGER_FN", None)
    if isinstance(table, dict):
        table[DepthAttnConfig.model_type] = _apply_to_host(table)


def _apply_to_host(table: dict[str, Callable]) -> Callable:
    """Return the function for our model type, which calls the one for the host.

    Args:
        table: Liger's functions by model type.
    """

    def apply(model: Any = None, **options: Any) -> None:
        if model is None:
            logger.warning(
                "Liger: a 'depthattn' model can only be patched after it is built, when its host is known; nothing is "
                "patched."
            )
            return
        host_type = model.config.text_config.model_type
        apply_to_host = table.get(host_type)
        if apply_to_host is None:
            logger.warning(
                f"use_liger_kernel: Liger has no kernels for the host {host_type!r}; training continues without them."
            )
            return
        if model.get_output_embeddings() is None:
            # This option would replace the forward of a classification head by that of a causal language model.
            options["fused_linear_cross_entropy"] = False
        accepted = inspect.signature(apply_to_host).parameters
        apply_to_host(model=model, **{name: value for name, value in options.items() if name in accepted})

    # Liger passes only the options that the signature names.
    functions = [inspect.signature(function).parameters for function in table.values()]
    names = {name for parameters in functions for name in parameters} | {"model"}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in sorted(names)]
    apply.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return apply
