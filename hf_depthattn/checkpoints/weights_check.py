"""Check from headers alone that the tensors of a checkpoint are those of its model.

The model is built on the meta device, where tensors have a shape and a dtype but no values; transformers' weight
conversions (per-expert weights, renamed modules) also work on such tensors. The check takes seconds and a few hundred
megabytes for a checkpoint of any size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import UserError
from ..errors.messages import one_line
from ..utils.quiet_libraries import quiet_libraries
from .checkpoint_files import TensorEntry
from .config_check import check_counts
from .foreign_tensors import COMPUTED
from .loading_info import check_loading_info

# dtypes of weights that can be trained, by their names in safetensors.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_weights(
    name: str, config: PreTrainedConfig, model_class: type[PreTrainedModel], entries: Mapping[str, TensorEntry]
) -> list[str]:
    """Check that the tensors of a checkpoint are those of its model.

    Args:
        name: name of the checkpoint in messages.
        config: its config.
        model_class: its class in transformers.
        entries: its tensors by name.

    Returns:
        Names of tensors that the model may ignore: other heads, vision parts, layers for multi-token prediction.

    Raises:
        UserError: if no model can be built from the config, or a tensor is missing, has another shape, is packed, or
            is not part of the model; the message names the first.
    """
    check_counts(name, config.to_dict())
    # Models modify their config.
    config = copy.deepcopy(config)
    with quiet_libraries(False):
        try:
            with torch.device("meta"):
                model = model_class(config)
            saved = _saved_tensors(model)
        except Exception as error:
            # The config is valid but the model cannot be built: sizes overflow, are not divisible, and so on.
            raise UserError(f"{name}: no model can be built from its config: {one_line(error)}") from error
        info = _compare(model, saved, entries) or _load_on_meta(name, config, model_class, entries)
    check_loading_info(info, model, name)
    unused = set(info["unexpected_keys"])
    _check_dtypes(name, saved, {key: entry for key, entry in entries.items() if key not in unused})
    return sorted(unused)


def check_before_loading(
    name: str, config: PreTrainedConfig, model_class: Any, entries: Mapping[str, TensorEntry]
) -> None:
    """Check that a checkpoint's config does not describe a larger model than its weights, before allocating memory.

    Args:
        name: name of the checkpoint in messages.
        config: its config.
        model_class: an Auto class, or a class of transformers.
        entries: its tensors by name.

    Raises:
        UserError: as in `check_weights`.
    """
    check_counts(name, config.to_dict())
    numbers = [int(match[1]) for match in map(_LAYER.search, entries) if match]
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if numbers and isinstance(num_layers, int) and num_layers > max(numbers) + 1:
        raise UserError(f"{name}: its config has {num_layers} layers, but its weights have {max(numbers) + 1}.")
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        model_class = mapping.get(type(config), None)
    # Custom code of a checkpoint may not work on the meta device.
    if isinstance(model_class, type) and model_class.__module__.partition(".")[0] in ("transformers", "hf_depthattn"):
        check_weights(name, config, model_class, entries)


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors on the meta device by the names under which transformers saves them."""
    return dict(revert_weight_conversion(model, dict(model.state_dict())))


def _compare(
    model: PreTrainedModel, saved: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]
) -> dict[str, Any] | None:
    """Return the loading info if names and shapes are those that transformers saves, and `None` otherwise."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key, tensor in saved.items():
        entry = entries.get(key)
        if entry is None and key in tied:
            continue
        if entry is None or tuple(tensor.shape) != entry.shape:
            return None
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unexpected = {key for key in entries if key not in saved and not any(p.search(key) for p in ignored)}
    return {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": unexpected, "error_msgs": []}


def _load_on_meta(
    name: str, config: PreTrainedConfig, model_class: type[PreTrainedModel], entries: Mapping[str, TensorEntry]
) -> dict[str, Any]:
    """Return transformers' loading info, for older names, base models without prefix, and damaged checkpoints."""
    tensors = {
        key: torch.empty(entry.shape, dtype=_FLOATS.get(entry.dtype, torch.float32), device="meta")
        for key, entry in entries.items()
    }
    try:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        # The message of transformers refers to a report in its log, which contains no more than this.
        odd = _odd_expert(entries) or one_line(error)
        raise UserError(f"{name}: its tensors cannot be converted: {odd}") from error
    # A pair, with `output_loading_info`.
    info: dict[str, Any] = loaded[1]
    return info


def _odd_expert(entries: Mapping[str, TensorEntry]) -> str | None:
    """Describe the first per-expert weight that differs in shape from the other experts of its layer."""
    groups: dict[str, list[str]] = {}
    for key in entries:
        if re.search(r"experts\.\d+\.", key):
            groups.setdefault(re.sub(r"(experts\.)\d+\.", r"\1*.", key), []).append(key)
    for keys in groups.values():
        shapes = [entries[key].shape for key in keys]
        usual = max(set(shapes), key=shapes.count)
        for key in keys:
            if entries[key].shape != usual:
                return f"{key} has the shape {list(entries[key].shape)}, but the other experts have {list(usual)}."
    return None


def _check_dtypes(name: str, saved: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]) -> None:
    for key, entry in entries.items():
        expected = saved.get(key)
        if expected is None and COMPUTED.search(key):
            continue
        if entry.dtype in _FLOATS or (expected is not None and not expected.is_floating_point()):
            continue
        raise UserError(f"{name}: tensor {key!r} has the dtype {entry.dtype}; allowed are {', '.join(_FLOATS)}.")
