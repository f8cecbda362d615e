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
from typing import Any, TypeVar

from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    PrefixChange,
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

# Our modules in a decoder layer.
_DEPTH_NAME = re.compile(r"\blayers\.\d+\.(?:attn|mlp|out)_depth(?:_kv)?\.")

# PEFT hands keys to the same renamings, behind its own prefix.
_PEFT_PREFIX = r"(?:base_model\.model\.)?"

_Transform = TypeVar("_Transform", bound=WeightTransform)


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
    register_checkpoint_conversion_mapping(class_name, [_for_host_names(entry) for entry in renamings], overwrite=True)


def _for_host_names(renaming: _Transform) -> _Transform:
    """A renaming of a host that leaves our names alone, and is matched against whole names.

    Renamings are regular expressions with bare dots: Mixtral's `.mlp.` also matches `.mlp_` in `.mlp_depth`, and
    Sarvam's conversion would fuse the projections in `mlp_depth_kv` into one. They are written for the outermost
    model (EXAONE's begin with `transformer.` in files and with `model.` in memory); registered for a child of it,
    transformers would cut the child's prefix off.
    """
    own_class: Any = type(renaming)
    renaming.__class__ = _class_for_host_names(own_class)
    return renaming


@cache
def _class_for_host_names(own_class: Any) -> Any:
    def rename_source_key(self: WeightTransform, source_key: str) -> tuple[str, str | None]:
        # A prefix of all names is ours as well.
        if not issubclass(own_class, PrefixChange) and _DEPTH_NAME.search(source_key):
            return source_key, None
        return own_class.rename_source_key(self, source_key)

    def reverse_transform(self: WeightTransform) -> WeightTransform:
        reverse = own_class.reverse_transform(self)
        return reverse if type(reverse) is type(self) else _for_host_names(reverse)

    def reduce(self: WeightTransform, protocol: int) -> tuple:
        # Loaded models keep their renamings, and `pickle` does not find classes that are made at run time.
        _, _, *state = own_class.__reduce_ex__(self, protocol)
        return _empty_for_host_names, (own_class,), *state

    namespace = {
        "__slots__": (),
        "scope_prefix": property(lambda self: None, lambda self, value: None),
        "rename_source_key": rename_source_key,
        "reverse_transform": reverse_transform,
        "__reduce_ex__": reduce,
    }
    return type(own_class.__name__, (own_class,), namespace)


def _empty_for_host_names(own_class: Any) -> WeightTransform:
    """A renaming to be filled by `pickle`."""
    for_host_names = _class_for_host_names(own_class)
    return for_host_names.__new__(for_host_names)


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
            # transformers hands in futures of tensors, and takes tensors too.
            conversion.add_tensor(target, key, pattern, state_dict[key])  # type: ignore[arg-type]
    for target, conversion in conversions.items():
        for name, value in conversion.convert(target, model=model, config=model.config).items():
            renamed[name] = value[0] if isinstance(value, list) else value
    return renamed
