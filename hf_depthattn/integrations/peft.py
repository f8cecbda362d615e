"""PEFT: LoRA on the host together with trained depth modules.

    model = get_peft_model(model, lora_config(model, r=16))

Depth queries and MoDA's gates are raw parameters, which LoRA cannot adapt and does not need to: they are few, so they
are trained whole, as `modules_to_save` under fixed leaf names. So are MoDA's projections of MLP inputs, which are new
and start at random: there is no pretrained matrix that a low rank could adapt. A plain config without
`target_modules` adapts what it adapts in the host (`peft_targets`), and trains no depth module.

MoDA's projections are called `k_proj` and `v_proj`, as in the host's attention. `lora_config` excludes them from every
choice of targets. A plain `LoraConfig(target_modules=["k_proj"])`, or the config of an adapter trained on the stock
host, takes them in: they get LoRA matrices that start at zero and change nothing, and PEFT reports these as missing
keys of the adapter. With `low_cpu_mem_usage=True` it leaves them without values; keep them out instead:

    config = PeftConfig.from_pretrained(adapter)
    config.exclude_modules = DEPTH_MODULES_PATTERN
    PeftModel.from_pretrained(model, adapter, config=config, low_cpu_mem_usage=True)

Names in adapters are the host's, so adapters trained on the stock host load as they are, and an adapter without depth
modules loads on the stock host. One kind needs a hand: an adapter with a LoRA per expert, saved under transformers 4,
must be loaded on the stock host and saved again, since PEFT fuses by model type.
"""

import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import is_peft_available

from .trainer import ADDED_MODULES, depth_parameter_names, is_depth_name, is_layer_name

if TYPE_CHECKING:
    from peft import LoraConfig

#: Matches every module that depth attention adds, and what is in it.
DEPTH_MODULES_PATTERN = rf"(?:.*\.)?(?:{'|'.join(ADDED_MODULES)})(?:\..*)?"

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(model: nn.Module, *, train_depth: bool = True, **lora_kwargs: Any) -> "LoraConfig":
    """A `LoraConfig` for a model with depth attention: LoRA on the host's linear layers, depth modules trained whole.

    Args:
        model: a model with depth attention, not yet wrapped by PEFT.
        train_depth: train the depth modules and save them in the adapter. Otherwise they stay as they are.
        **lora_kwargs: fields of `peft.LoraConfig`, which win over the defaults here:
            `target_modules`: all linear layers in the decoder layers, by leaf name. `"all-linear"` works too. Fused
                experts of MoE hosts are not linear layers; give `target_parameters` to adapt them.
            `modules_to_save`, `exclude_modules`: the depth modules are added to what is given.
            `task_type`: by the class of the model.

    Raises:
        ImportError: without peft.
        ValueError: if the model has no depth modules, or adapters already.
    """
    if not is_peft_available():
        raise ImportError("lora_config needs peft: pip install 'hf-depthattn[peft]'")
    from peft import LoraConfig

    if hasattr(model, "peft_config"):
        raise ValueError(f"model: {type(model).__name__} has adapters already; give the model without them.")
    module_names = [name for name, _ in model.named_modules()]
    if not any(is_depth_name(name) for name in module_names):
        raise ValueError(f"model: {type(model).__name__} has no depth modules ({', '.join(ADDED_MODULES)}).")
    if lora_kwargs.get("target_modules") is None:
        lora_kwargs["target_modules"] = _linear_leaf_names(model)
    lora_kwargs["exclude_modules"] = _exclude_depth(lora_kwargs.get("exclude_modules"))
    # The sites of the residual connection have no parameters: nothing to save.
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
    """Leaf names of the host's linear layers in the decoder layers: never the head, never in a depth module."""
    linear = [name for name, module in model.named_modules() if _is_plain_linear(module) and is_layer_name(name)]
    return sorted({name.rpartition(".")[2] for name in linear})


def _is_plain_linear(module: nn.Module) -> bool:
    # Quantised layers are subclasses too. A host's own subclass is a router that returns a tuple (PhiMoE).
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


def _exclude_depth(excluded: str | list[str] | None) -> str:
    """PEFT takes a list of names or one pattern; the depth modules need the pattern, so a list becomes one."""
    if not excluded:
        return DEPTH_MODULES_PATTERN
    if not isinstance(excluded, str):
        excluded = rf"(?:.*\.)?(?:{'|'.join(re.escape(name) for name in excluded)})"
    return f"(?:{excluded})|(?:{DEPTH_MODULES_PATTERN})"
