"""Liger's kernels for the host: `use_liger_kernel=True` of `TrainingArguments`.

Liger finds by model type what it replaces in a model. Ours have the structure of their host, so that its function for
the host's type fits them; this file enters one for our type that calls it. Depth sites and MoDA stay as they are.

The entry is made when Liger is first imported. Importing it here would cost every program seconds, and `Trainer`
imports it just before it looks the model type up.
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
    """Tell Liger about our model type, now or when it is imported."""
    call_after_import(_LIGER_MODULE, _enter)


def _enter() -> None:
    table = getattr(import_module(_LIGER_MODULE), "MODEL_TYPE_TO_APPLY_LIGER_FN", None)
    if isinstance(table, dict):
        table[DepthAttnConfig.model_type] = _apply_to_host(table)


def _apply_to_host(table: dict[str, Callable]) -> Callable:
    """The function for our model type: it calls the one of the host.

    Args:
        table: Liger's functions by model type.
    """

    def apply(model: Any = None, **options: Any) -> None:
        if model is None:
            logger.warning(
                "Liger: the host of a 'depthattn' model is not known before it is built; nothing is patched."
            )
            return
        host_type = model.config.text_config.model_type
        apply_to_host = table.get(host_type)
        if apply_to_host is None:
            logger.warning(
                f"use_liger_kernel: Liger has no kernels for the host {host_type!r}; training runs without."
            )
            return
        if model.get_output_embeddings() is None:
            # It would give heads without logits over the vocabulary the forward of a causal model.
            options["fused_linear_cross_entropy"] = False
        accepted = inspect.signature(apply_to_host).parameters
        apply_to_host(model=model, **{name: value for name, value in options.items() if name in accepted})

    # Liger hands on only what the signature names.
    functions = [inspect.signature(function).parameters for function in table.values()]
    names = {name for parameters in functions for name in parameters} | {"model"}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in sorted(names)]
    apply.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return apply
