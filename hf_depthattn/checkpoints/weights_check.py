"""Whether the tensors of a checkpoint are those of its model, by headers alone.

The model is built on the meta device, where tensors have a shape and a dtype but no values; transformers' own
conversions (per-expert weights, renamed modules) run on such tensors, too. So this costs seconds and some hundred
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

# The types of weights that can be trained, as safetensors names them.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_weights(
    name: str, config: PreTrainedConfig, model_class: type[PreTrainedModel], entries: Mapping[str, TensorEntry]
) -> list[str]:
    """Refuse a checkpoint that does not hold exactly what its model needs.

    Args:
        name: how to call the checkpoint in messages.
        config: its config.
        model_class: its class in transformers.
        entries: its tensors by name.

    Returns:
        Names of tensors that the model leaves out: other heads, parts for images, layers that predict further tokens.

    Raises:
        UserError: sizes that no model can have; a tensor that is missing, has another shape, is packed, or has
            no place in the model. The message is one line and names the first.
    """
    check_counts(name, config.to_dict())
    # Models write into their config.
    config = copy.deepcopy(config)
    with quiet_libraries(False):
        try:
            with torch.device("meta"):
                model = model_class(config)
            saved = _saved_tensors(model)
        except Exception as error:
            # A config that its own class accepts and cannot build: sizes that overflow or do not divide, and so on.
            raise UserError(f"{name}: no model can be built from its config: {one_line(error)}") from error
        info = _compare(model, saved, entries) or _load_on_meta(name, config, model_class, entries)
    check_loading_info(info, model, name)
    unused = set(info["unexpected_keys"])
    _check_dtypes(name, saved, {key: entry for key, entry in entries.items() if key not in unused})
    return sorted(unused)


def check_before_loading(
    name: str, config: PreTrainedConfig, model_class: Any, entries: Mapping[str, TensorEntry]
) -> None:
    """Refuse a checkpoint whose config asks for a larger model than its weights are: it would be built, in memory.

    Args:
        name: how to call the checkpoint in messages.
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
        raise UserError(f"{name}: its config has {num_layers} layers, its weights have {max(numbers) + 1}.")
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        model_class = mapping.get(type(config), None)
    # Code of a checkpoint may build its model in ways that the meta device does not know.
    if isinstance(model_class, type) and model_class.__module__.partition(".")[0] in ("transformers", "hf_depthattn"):
        check_weights(name, config, model_class, entries)


def _saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name -> tensor without values, as transformers would save the model: with the host's own names."""
    return dict(revert_weight_conversion(model, dict(model.state_dict())))


def _compare(
    model: PreTrainedModel, saved: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]
) -> dict[str, Any] | None:
    """The usual case, quickly: names and shapes are those that transformers would save. `None` if they are not."""
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
    """What transformers itself says: older names, base models without their prefix, and whatever is wrong."""
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
        # transformers points to a report in its log, which says no more than this.
        odd = _odd_expert(entries) or one_line(error)
        raise UserError(f"{name}: its tensors cannot be put together: {odd}") from error
    # A pair, with `output_loading_info`.
    info: dict[str, Any] = loaded[1]
    return info


def _odd_expert(entries: Mapping[str, TensorEntry]) -> str | None:
    """The first per-expert weight whose shape is not that of the other experts of its layer."""
    groups: dict[str, list[str]] = {}
    for key in entries:
        if re.search(r"experts\.\d+\.", key):
            groups.setdefault(re.sub(r"(experts\.)\d+\.", r"\1*.", key), []).append(key)
    for keys in groups.values():
        shapes = [entries[key].shape for key in keys]
        usual = max(set(shapes), key=shapes.count)
        for key in keys:
            if entries[key].shape != usual:
                return f"{key} has the shape {list(entries[key].shape)}, the other experts have {list(usual)}."
    return None


def _check_dtypes(name: str, saved: Mapping[str, torch.Tensor], entries: Mapping[str, TensorEntry]) -> None:
    for key, entry in entries.items():
        expected = saved.get(key)
        if expected is None and COMPUTED.search(key):
            continue
        if entry.dtype in _FLOATS or (expected is not None and not expected.is_floating_point()):
            continue
        raise UserError(
            f"{name}: tensor {key!r} is of the type {entry.dtype}, and its model wants one of {', '.join(_FLOATS)}."
        )
