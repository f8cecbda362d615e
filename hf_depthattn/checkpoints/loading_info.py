"""What `from_pretrained` says about the tensors of a checkpoint, and what is wrong with that."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from ..errors import UserError
from .foreign_tensors import COMPUTED, OF_AN_ADAPTER, PACKED

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OF_OTHER_MODALITIES = re.compile(r"(visi|visual|image|audio|speech|multi_?modal)")
# Layers that predict further tokens lie behind the others; transformers' models leave them out.
_NUM_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Scales of activations, which quanto adds to each layer with the value 1 and uses only if it quantises activations.
_QUANTO_SCALES = ("input_scale", "output_scale")


def check_loading_info(info: dict[str, Any], model: PreTrainedModel, name: str) -> None:
    """Refuse a model that is not all of its checkpoint, or more than that.

    Args:
        info: from `from_pretrained(..., output_loading_info=True)`.
        model: what was loaded.
        name: how the user named the checkpoint.

    Raises:
        UserError: see above; the message names the first tensor.
    """
    unexpected = sorted(key for key in info["unexpected_keys"] if not COMPUTED.search(key))
    if found := [key for key in unexpected if OF_AN_ADAPTER.search(key)]:
        raise UserError(
            f"{name}: has tensors of an adapter that was not merged ({_first(found)}); merge it (merge_and_unload) "
            "and save the result."
        )
    if found := [key for key in unexpected if PACKED.search(key)]:
        raise UserError(
            f"{name}: has weights packed by a quantiser ({_first(found)}), and no quantization_config that reads them."
        )
    if found := sorted(key for key in info["missing_keys"] if not _is_spare_scale(key, model)):
        raise UserError(f"{name}: lacks tensors of the model ({_first(found)}).")
    if found := sorted(info["mismatched_keys"]):
        shapes = [f"{key}: {list(in_file)}, not {list(in_model)}" for key, in_file, in_model in found]
        raise UserError(f"{name}: has tensors of other shapes than its config says ({_first(shapes)}).")
    if found := [key for key in unexpected if _is_of_decoder(key, model)]:
        raise UserError(
            f"{name}: has tensors without a place in {type(model).__name__} ({_first(found)}); without them it would "
            "be another model."
        )
    if info.get("error_msgs"):
        raise UserError(f"{name}: cannot be loaded: {' '.join(str(info['error_msgs'][0]).split())}")


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _is_spare_scale(key: str, model: PreTrainedModel) -> bool:
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return method == "quanto" and key.rpartition(".")[2] in _QUANTO_SCALES


def _is_of_decoder(key: str, model: PreTrainedModel) -> bool:
    """Whether a key belongs to the text model itself: not to another head, nor to a part for images or sound."""
    layer = _IN_LAYER.search(key)
    start = key[: layer.start()] if layer else key
    if _OF_OTHER_MODALITIES.search(start):
        return False
    if layer is None:
        return key.startswith(f"{model.base_model_prefix}.")
    config = model.config.get_text_config()
    num_extra = next((extra for name in _NUM_EXTRA_LAYERS if (extra := getattr(config, name, None))), 0)
    num_layers = config.num_hidden_layers
    return "mtp" not in start and not num_layers <= int(layer[1]) < num_layers + num_extra
