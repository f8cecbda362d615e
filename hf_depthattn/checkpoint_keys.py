"""Names in checkpoints: those in memory, and what older or stock files call them.

Our classes have the host's own structure, so the names of parameters are the host's, in memory and in files, and
`model.layers.0.attn_depth.query` and others beside them. Three things are left to do here:

- Hosts with renamings of their own (per-expert weights in files, fused ones in memory) keep them. transformers finds
  them by class name or model type, and ours are neither, so they are registered for our class on each host.
- Folders and adapters that version 0.1.0.dev0 saved before it had the host's structure are read.
- `load_state_dict` takes the tensors of a file, which `Trainer` hands to it when it resumes.
"""

import copy
import re
from collections.abc import Mapping
from functools import cache
from typing import SupportsIndex

from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import PreTrainedModel

#: Names of the base model in the heads of hosts; the question-answering heads of some have the second one.
BASE_MODEL_NAMES = ("model", "transformer")

# Files of EXAONE have the second one too, in front of names that are EXAONE's; its own renamings do both.
_NOT_EXAONE = r"(?!(?:h|ln_f|wte)\.)"

# PEFT hands keys to the same renamings, behind its own prefix.
_PEFT_PREFIX = r"(?:base_model\.model\.)?"


class OneWayRenaming(WeightRenaming):
    """A renaming for reading only: what is saved has the names in memory.

    Args:
        pattern: regular expression in checkpoint keys; its first match is replaced.
        replacement: as in `re.sub`.
    """

    __slots__ = ("pattern", "replacement")

    def __init__(self, pattern: str, replacement: str):
        super().__init__(source_patterns=pattern, target_patterns=re.sub(r"\\\d", "", replacement))
        self.pattern = pattern
        self.replacement = replacement

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        renamed = re.sub(self.pattern, self.replacement, source_key, count=1)
        return renamed, self.source_patterns[0] if renamed != source_key else None

    def reverse_transform(self) -> WeightRenaming:
        return OneWayRenaming(r"(?!)", "")  # never matches


class DepthNameRepair(WeightRenaming):
    """Undoes what renamings of hosts do to our names on saving; on loading it changes nothing.

    They are regular expressions with bare dots: Mixtral's `.mlp.` also matches `.mlp_` in `.mlp_depth`.
    """

    __slots__ = ("is_reverse",)

    def __init__(self, is_reverse: bool = False):
        super().__init__(source_patterns=r"(?!)", target_patterns="")
        self.is_reverse = is_reverse

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        # A model keeps the renamings that its file used, to reverse them when it is saved.
        self._was_used = True  # type: ignore[misc] # a slot of the base class
        if not self.is_reverse:
            return source_key, None
        return re.sub(r"(\blayers\.\d+\.)\w+\.(depth|depth_kv)\.", r"\1mlp_\2.", source_key), None

    def reverse_transform(self) -> WeightRenaming:
        return DepthNameRepair(is_reverse=not self.is_reverse)


def register_host_renamings(class_name: str, host_class: type[PreTrainedModel], model_type: str) -> None:
    """Register the renamings of a host for our class on this host.

    Args:
        class_name: name of our class on this host, under which transformers looks them up.
        host_class: the host's base model class.
        model_type: the host's model type, which may be another than that of the class.
    """
    renamings = get_checkpoint_conversion_mapping(host_class.__name__)
    if renamings is None:
        renamings = get_checkpoint_conversion_mapping(model_type) or []
    # Reversed on saving: the repair then comes last.
    renamings = [DepthNameRepair(), *map(_seeing_whole_names, renamings)]
    register_checkpoint_conversion_mapping(class_name, renamings, overwrite=True)


def _seeing_whole_names(renaming: WeightTransform) -> WeightTransform:
    """A renaming that is matched against whole names although it is registered for a child of the model.

    transformers cuts the child's prefix off. The host's are written for the outermost model: EXAONE's begin with
    `transformer.` in files and with `model.` in memory.
    """
    renaming.__class__ = _class_seeing_whole_names(type(renaming))  # type: ignore[arg-type] # types are hashable
    return renaming


@cache
def _class_seeing_whole_names(own_class: type) -> type:
    def reduce(self: WeightTransform, protocol: SupportsIndex) -> tuple:
        # Loaded models keep their renamings, and `pickle` does not find classes that are made at run time.
        reduced = super(on_whole_names, self).__reduce_ex__(protocol)  # type: ignore[arg-type,misc] # made below
        return _empty_seeing_whole_names, (own_class,), *reduced[2:]

    no_prefix = property(lambda self: None, lambda self, value: None)
    namespace = {"__slots__": (), "scope_prefix": no_prefix, "__reduce_ex__": reduce}
    on_whole_names = type(own_class.__name__, (own_class,), namespace)
    return on_whole_names


def _empty_seeing_whole_names(own_class: type) -> WeightTransform:
    """A renaming to be filled by `pickle`."""
    return object.__new__(_class_seeing_whole_names(own_class))


def register_old_names(model_type: str, question_answering_class: str) -> None:
    """Register how names are read that our classes do not have: those of 0.1.0.dev0, and of other heads.

    Args:
        model_type: our model type.
        question_answering_class: name of our question-answering head. It calls the base model as the host's does,
            and takes files with either name: without one, transformers adds the right one.
    """
    nested_host = OneWayRenaming(rf"^({_PEFT_PREFIX}(?:model\.)?)host\.", r"\1")
    other_head = OneWayRenaming(rf"^transformer\.{_NOT_EXAONE}", "")
    any_head = OneWayRenaming(rf"^(?:{'|'.join(BASE_MODEL_NAMES)})\.{_NOT_EXAONE}(?:host\.)?", "")
    register_checkpoint_conversion_mapping(model_type, [nested_host, other_head], overwrite=True)
    register_checkpoint_conversion_mapping(question_answering_class, [any_head], overwrite=True)


def names_in_memory(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors under the names of a file -> the same under the names of the model in memory, for `load_state_dict`.

    `from_pretrained` does this itself. `Trainer` does not: to resume or to load the best model, it hands the tensors
    of a file to `load_state_dict`. Names that the model has are left alone; per-expert weights of a host are fused.

    Args:
        model: the model that gets the tensors.
        state_dict: tensors by name, all experts of a layer together.
    """
    own_state = model.state_dict()
    if state_dict.keys() <= own_state.keys():
        return state_dict
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    renamed: dict[str, Tensor] = {}
    conversions: dict[str, WeightConverter] = {}
    # In the order of the numbers in the keys, which is the order of the experts.
    for key in sorted(state_dict, key=dot_natural_key):
        if key in own_state:
            renamed[key] = state_dict[key]
            continue
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own_state)
        if pattern is None:
            renamed[target] = state_dict[key]
        else:
            conversion = conversions.setdefault(target, copy.deepcopy(converter_of_pattern[pattern]))
            conversion.add_tensor(target, key, pattern, state_dict[key])
    for target, conversion in conversions.items():
        for name, value in conversion.convert(target, model=model, config=model.config).items():
            renamed[name] = value[0] if isinstance(value, list) else value
    return renamed
