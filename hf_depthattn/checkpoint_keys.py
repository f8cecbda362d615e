"""Checkpoint keys: in memory the host is nested under `host`, in checkpoints its keys are its own.

    checkpoint                  DepthAttnForCausalLM             DepthAttnModel          other heads
    model.layers.0.mlp.*        host.model.layers.0.mlp.*        host.layers.0.mlp.*     model.host.layers.0.mlp.*
    lm_head.weight              host.lm_head.weight              -                       -

transformers 5 maps keys on load and back on save with `WeightRenaming`s. Ours is one rule per direction and knows
which class it renames for, so a base checkpoint fits every head and the reverse, as it does for the host itself.
Conversions of the host (per-expert weights into fused tensors) run after it, on the nested host, which is a real
`PreTrainedModel`.
"""

import copy
import re
from collections.abc import Mapping

from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import PreTrainedModel

#: Keys of heads, by their first part. Everything else belongs to the base model.
_HOST_HEAD = "lm_head"
_OWN_HEADS = ("score", "qa_outputs")

#: Names of the base model in heads of hosts; their question-answering heads have the second one.
BASE_MODEL_NAMES = ("model", "transformer")

# PEFT passes adapter keys through the same mapping, behind its own prefix.
_PEFT_PREFIX = "base_model.model."


class HostKeyNesting(WeightRenaming):
    """Checkpoint key -> key of the nested host.

    Args:
        base_path: where a class keeps the host's base model, with a trailing dot: `"host.model."` for the causal LM.
    """

    __slots__ = ("base_path",)

    def __init__(self, base_path: str):
        super().__init__(source_patterns=r"^(.+)", target_patterns=r"host\.\1")
        self.base_path = base_path

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        prefix = _PEFT_PREFIX if source_key.startswith(_PEFT_PREFIX) else ""
        key = source_key.removeprefix(prefix)
        head, _, rest = key.partition(".")
        if re.match(r"(model\.)?host\.", key) or head in _OWN_HEADS:
            renamed = key
        elif head == _HOST_HEAD:
            renamed = f"host.{key}" if self.base_path == "host.model." else key
        else:
            renamed = self.base_path + (rest if head in BASE_MODEL_NAMES else key)
        self._was_used = True  # type: ignore[misc] # a slot of the base class
        return prefix + renamed, self.source_patterns[0]

    def reverse_transform(self) -> "HostKeyUnnesting":
        return HostKeyUnnesting(self.base_path)


class HostKeyUnnesting(WeightRenaming):
    """Key of the nested host -> checkpoint key: the `host.` level is left out."""

    __slots__ = ("base_path",)

    def __init__(self, base_path: str):
        super().__init__(source_patterns=r"host\.(.+)", target_patterns=r"\1")
        self.base_path = base_path

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        self._was_used = True  # type: ignore[misc] # a slot of the base class
        pattern = rf"^((?:{re.escape(_PEFT_PREFIX)})?(?:model\.)?)host\."
        renamed = re.sub(pattern, r"\1", source_key)
        # Renamings of hosts are regular expressions with bare dots: Mixtral's ".mlp." has matched ".mlp_depth" or
        # ".mlp_depth_kv" before.
        return re.sub(r"(\blayers\.\d+\.)\w+\.(depth|depth_kv)\.", r"\1mlp_\2.", renamed), self.source_patterns[0]

    def reverse_transform(self) -> HostKeyNesting:
        return HostKeyNesting(self.base_path)


def register_key_mapping(name: str, base_path: str) -> None:
    """Register the mapping of a class, or of our model type for wrappers that rename a class.

    Args:
        name: class name or model type. A name that transformers maps itself is left alone.
        base_path: where the class keeps the host's base model, with a trailing dot.
    """
    registered = get_checkpoint_conversion_mapping(name)
    if registered is None or type(registered[0]).__name__ == HostKeyNesting.__name__:
        register_checkpoint_conversion_mapping(name, [HostKeyNesting(base_path)], overwrite=True)


def nest_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors under checkpoint keys -> the same under the keys of the model in memory, for `load_state_dict`.

    `from_pretrained` does this itself. `Trainer` does not: to resume or to load the best model, it hands the tensors
    of a file to `load_state_dict`. Keys that the model has are left alone; per-expert weights of a host are fused.

    Args:
        model: the model that gets the tensors.
        state_dict: tensors by key, all experts of a layer together.
    """
    own_keys = model.state_dict().keys()
    if state_dict.keys() <= own_keys:
        return state_dict
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    nested: dict[str, Tensor] = {}
    conversions: dict[str, WeightConverter] = {}
    # In the order of the numbers in the keys, which is the order of the experts.
    for key in sorted(state_dict, key=dot_natural_key):
        if key in own_keys:
            nested[key] = state_dict[key]
            continue
        target, pattern = rename_source_key(key, renamings, converters)
        if pattern is None:
            nested[target] = state_dict[key]
        else:
            conversion = conversions.setdefault(target, copy.deepcopy(converter_of_pattern[pattern]))
            conversion.add_tensor(target, key, pattern, state_dict[key])
    for target, conversion in conversions.items():
        for name, value in conversion.convert(target, model=model, config=model.config).items():
            nested[name] = value[0] if isinstance(value, list) else value
    return nested
