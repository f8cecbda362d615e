"""Renaming of checkpoint keys.

Our classes have the structure of the host, so parameters have the host's names, in memory and in checkpoints; depth
parameters are added under names such as `model.depth_reads.query`. Renamings are needed in four cases:

- Some hosts have renamings or conversions of their own (per-expert weights in checkpoints, fused ones in memory).
  transformers looks them up by class name or model type, so they are registered for our class on each host.
- Checkpoints and adapters saved by version 0.1.0.dev0 have another structure.
- Checkpoints saved before reads had a common module have a query and a key-norm weight per site, which are stacked.
- `Trainer` passes tensors with the names in checkpoints to `load_state_dict` when it resumes.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import Tensor
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import PreTrainedModel

#: Names of the base model in models with a head; the question answering heads of some hosts have the second one.
BASE_MODEL_NAMES = ("model", "transformer")

# Checkpoints of EXAONE have the second one too, followed by names of its own; EXAONE's renamings handle them.
_NOT_EXAONE = r"(?!(?:h|ln_f|wte)\.)"

# Names of our modules.
_DEPTH_NAME = re.compile(r"\blayers\.\d+\.(?:attn|mlp|out)_depth(?:_kv)?\.|\bdepth_reads\.")

# Sites in checkpoints of the old layout; sorted by name, their tensors are in the order of the sites.
_OLD_SITE = r"layers.*.(?:attn|mlp|out)_depth"

# PEFT applies the same renamings to keys with its own prefix.
_PEFT_PREFIX = r"(?:base_model\.model\.)?"

_Transform = TypeVar("_Transform", bound=WeightTransform)


class OneWayRenaming(WeightRenaming):
    """A renaming that is applied when loading but not reverted when saving.

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


class OneWayConverter(WeightConverter):
    """A conversion that is applied when loading but not reverted when saving; arguments as in `WeightConverter`."""

    __slots__ = ()

    # Of a base model inside a model with a head, transformers only converts keys with its prefix; a checkpoint of the
    # base model alone has none.
    scope_prefix = property(lambda self: None, lambda self, value: None)

    def reverse_transform(self) -> WeightRenaming:
        return OneWayRenaming(r"(?!)", "")  # never matches


def stacking_of_old_sites() -> list[WeightConverter]:
    """Return the conversions that stack queries and key-norm weights of checkpoints with one of each per site."""
    # transformers before 5.18 also finds a pattern without `$` at the start of a name, as in `query_proj.weight`.
    return [
        OneWayConverter(rf"{_OLD_SITE}.query$", "depth_reads.query", [MergeModulelist(dim=0)]),
        OneWayConverter(rf"{_OLD_SITE}.key_norm.weight$", "depth_reads.key_norm", [MergeModulelist(dim=0)]),
    ]


_STACKING = tuple(stacking_of_old_sites())


def stacked_name(name: str) -> str | None:
    """Return the name of the stacked tensor that has an old tensor of a site as a row; `None` for other tensors."""
    for conversion in _STACKING:
        renamed, pattern = conversion.rename_source_key(name)
        if pattern is not None:
            return renamed
    return None


def check_no_old_sites(names: Iterable[str]) -> None:
    """Check that no query and no key-norm weight of a site is lost because nothing has stacked them.

    Args:
        names: names of tensors that are about to be loaded.

    Raises:
        ValueError: if there is one.
    """
    if old := sorted(name for name in names if stacked_name(name) is not None):
        raise ValueError(
            f"{old[0]}: saved when sites had queries of their own, like {len(old) - 1} other tensors; now these are "
            "rows of `depth_reads`. A PEFT adapter must be converted first: "
            "hf_depthattn.checkpoints.old_adapters.convert_adapter(FOLDER, NEW_FOLDER). Checkpoints are converted by "
            "`from_pretrained` and by `load_state_dict` of the model."
        )


def register_host_renamings(class_name: str, host_class: type[PreTrainedModel], model_type: str) -> None:
    """Register the renamings of a host, and those of the old layout, for our base model on this host.

    Args:
        class_name: name of our class on this host, under which transformers looks up renamings.
        host_class: the host's base model class.
        model_type: the host's model type, which can differ from that of the class.
    """
    renamings = get_checkpoint_conversion_mapping(host_class.__name__)
    if renamings is None:
        renamings = get_checkpoint_conversion_mapping(model_type) or []
    entries = [*(_for_host_names(entry) for entry in renamings), *stacking_of_old_sites()]
    register_checkpoint_conversion_mapping(class_name, entries, overwrite=True)


def _for_host_names(renaming: _Transform) -> _Transform:
    """Change a host's renaming so that it ignores depth parameters and is matched against full names.

    Renamings are regular expressions with unescaped dots: Mixtral's `.mlp.` also matches `.mlp_` in `.mlp_depth`, and
    Sarvam's conversion would fuse the projections in `mlp_depth_kv`. They are written for the full names of the
    outermost model (`transformer.` in checkpoints and `model.` in memory for EXAONE), but transformers removes the
    prefix of a child model before it applies the child's renamings.
    """
    own_class: Any = type(renaming)
    renaming.__class__ = _class_for_host_names(own_class)
    return renaming


@cache
def _class_for_host_names(own_class: Any) -> Any:
    def rename_source_key(self: WeightTransform, source_key: str) -> tuple[str, str | None]:
        # A change of the common prefix also applies to depth parameters.
        if not issubclass(own_class, PrefixChange) and _DEPTH_NAME.search(source_key):
            return source_key, None
        return own_class.rename_source_key(self, source_key)

    def reverse_transform(self: WeightTransform) -> WeightTransform:
        reverse = own_class.reverse_transform(self)
        return reverse if type(reverse) is type(self) else _for_host_names(reverse)

    def reduce(self: WeightTransform, protocol: int) -> tuple:
        # Loaded models keep their renamings, and `pickle` does not find classes that are created at run time.
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
    """Return an uninitialised renaming, for `pickle`."""
    for_host_names = _class_for_host_names(own_class)
    return for_host_names.__new__(for_host_names)


def register_old_names(model_type: str, question_answering_class: str) -> None:
    """Register renamings for checkpoints of version 0.1.0.dev0, and for other names of the base model.

    Args:
        model_type: our model type.
        question_answering_class: name of our question answering class. Its base model has the same name as in the
            host's class, and either name in a checkpoint is removed; transformers then adds the right one.
    """
    nested_host = OneWayRenaming(rf"^({_PEFT_PREFIX}(?:model\.)?)host\.", r"\1")
    other_head = OneWayRenaming(rf"^transformer\.{_NOT_EXAONE}", "")
    any_head = OneWayRenaming(rf"^(?:{'|'.join(BASE_MODEL_NAMES)})\.{_NOT_EXAONE}(?:host\.)?", "")
    register_checkpoint_conversion_mapping(model_type, [nested_host, other_head], overwrite=True)
    register_checkpoint_conversion_mapping(question_answering_class, [any_head], overwrite=True)


def names_in_memory(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert a state dict from the names in a checkpoint to the names in memory, for `load_state_dict`.

    `from_pretrained` does this itself, but `Trainer` passes the tensors of a checkpoint to `load_state_dict` to resume
    training or to load the best model. Names that the model has are kept; per-expert weights of a host are fused.

    Args:
        model: the model to load into.
        state_dict: tensors by name, including all experts of a layer.

    Returns:
        The tensors by their names in memory.
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
    # Sorted by the numbers in the keys, so that experts are in order.
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
