"""PEFT: LoRA on the host's linear layers, with the depth modules trained in full.

    model = get_peft_model(model, lora_config(model, r=16))

Queries and MoDA's gates are parameters outside linear layers, which LoRA cannot adapt. They are few, so they are
trained in full, as `modules_to_save`. So are MoDA's projections of MLP inputs, which are randomly initialised and have
no pretrained weights to adapt. A plain `LoraConfig` without `target_modules` has the default targets of the host
(`peft_targets`) and does not train depth modules.

MoDA's projections are named `k_proj` and `v_proj`, as in the host's attention. `lora_config` excludes them from the
targets. A plain `LoraConfig(target_modules=["k_proj"])` also matches them and trains LoRA on them. So does the config
of an adapter trained on the stock host: the adapter has no weights for them, PEFT reports missing keys, and their
update stays zero (`lora_B` is initialised to zero). With `low_cpu_mem_usage=True` PEFT does not initialise them;
exclude them instead:

    config = PeftConfig.from_pretrained(adapter)
    config.exclude_modules = DEPTH_MODULES_PATTERN
    PeftModel.from_pretrained(model, adapter, config=config, low_cpu_mem_usage=True)

Parameter names in adapters are the host's: adapters trained on the stock host load without conversion, and an adapter
without depth modules loads on the stock host. Exceptions are adapters with LoRA on single experts, saved under
transformers 4: load them on the stock host and save them again, since PEFT fuses experts by model type.
"""

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import is_peft_available

from .trainer import ADDED_MODULES, depth_parameter_names, is_depth_name, is_layer_name

if TYPE_CHECKING:
    from peft import LoraConfig

#: Regular expression for the names of all modules that depth attention adds, with their submodules.
DEPTH_MODULES_PATTERN = rf"(?:.*\.)?(?:{'|'.join(ADDED_MODULES)})(?:\..*)?"

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(model: nn.Module, *, train_depth: bool = True, **lora_kwargs: Any) -> "LoraConfig":
    """Return a `LoraConfig` with LoRA on the host's linear layers, and with the depth modules trained in full.

    Args:
        model: a model with depth attention, not yet wrapped by PEFT.
        train_depth: whether to train the depth modules and save them in the adapter; otherwise they are frozen.
        **lora_kwargs: fields of `peft.LoraConfig`. Defaults here:
            `target_modules`: all linear layers in the decoder layers, by the last part of their name.
                `"all-linear"` is also accepted. Fused experts of MoE hosts are not linear layers; use
                `target_parameters` to adapt them.
            `modules_to_save`, `exclude_modules`: the depth modules, in addition to the modules given.
            `task_type`: inferred from the class of the model.

    Returns:
        The config for `peft.get_peft_model`.

    Raises:
        ImportError: if peft is not installed.
        ValueError: if the model has no depth modules, or already has adapters.
    """
    if not is_peft_available():
        raise ImportError("lora_config needs peft: pip install 'hf-depthattn[peft]'")
    from peft import LoraConfig

    if hasattr(model, "peft_config"):
        raise ValueError(f"model: {type(model).__name__} already has adapters; pass the model without them.")
    module_names = [name for name, _ in model.named_modules()]
    if not any(is_depth_name(name) for name in module_names):
        raise ValueError(f"model: {type(model).__name__} has no depth modules ({', '.join(ADDED_MODULES)}).")
    if lora_kwargs.get("target_modules") is None:
        lora_kwargs["target_modules"] = _linear_leaf_names(model)
    lora_kwargs["exclude_modules"] = _exclude_depth(lora_kwargs.get("exclude_modules"))
    # The sites of the residual connection have no parameters to save.
    leaf_names = {part for name in depth_parameter_names(model) for part in name.split(".")}
    depth_modules = [name for name in ADDED_MODULES if name in leaf_names]
    if train_depth and depth_modules:
        modules_to_save = lora_kwargs.get("modules_to_save") or []
        if isinstance(modules_to_save, str):
            modules_to_save = [modules_to_save]
        lora_kwargs["modules_to_save"] = list(dict.fromkeys([*modules_to_save, *depth_modules]))
    if "task_type" not in lora_kwargs:
        lora_kwargs["task_type"] = next(
            (task for suffix, task in _TASK_TYPES.items() if type(model).__name__.endswith(suffix)), None
        )
    return LoraConfig(**lora_kwargs)


def _linear_leaf_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all linear layers in the decoder layers, depth modules excluded."""
    linear = [name for name, module in model.named_modules() if _is_plain_linear(module) and is_layer_name(name)]
    return sorted({name.rpartition(".")[2] for name in linear})


def _is_plain_linear(module: nn.Module) -> bool:
    # Subclasses count, since quantised layers are; but a subclass in transformers is a router that returns a tuple.
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


def _exclude_depth(excluded: str | list[str] | None) -> str:
    """Return `exclude_modules` extended by the depth modules, as a regular expression."""
    if not excluded:
        return DEPTH_MODULES_PATTERN
    if not isinstance(excluded, str):
        excluded = rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in excluded)})"
    return f"(?:{excluded})|(?:{DEPTH_MODULES_PATTERN})"
