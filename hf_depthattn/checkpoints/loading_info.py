"""Check the loading info of `from_pretrained`: missing, unexpected and mismatched tensors."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from ..attn_res_reads import DEPTH_READS
from ..errors import UserError
from .foreign_tensors import COMPUTED, OF_AN_ADAPTER, PACKED

_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_OF_OTHER_MODALITIES = re.compile(r"(visi|visual|image|audio|speech|multi_?modal)")
# Layers for multi-token prediction come after the others; transformers' models ignore them.
_NUM_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Scales of activations that quanto adds to each layer with value 1, and uses only if it quantises activations.
_QUANTO_SCALES = ("input_scale", "output_scale")


def check_loading_info(info: dict[str, Any], model: PreTrainedModel, name: str) -> None:
    """Check that the tensors of a checkpoint are those of the model.

    Args:
        info: from `from_pretrained(..., output_loading_info=True)`.
        model: the loaded model.
        name: name of the checkpoint in messages.

    Raises:
        UserError: if a tensor is missing, has another shape, or is not part of the model; the message names the first.
    """
    unexpected = sorted(key for key in info["unexpected_keys"] if not COMPUTED.search(key))
    if found := [key for key in unexpected if OF_AN_ADAPTER.search(key)]:
        raise UserError(
            f"{name}: has tensors of an adapter that was not merged ({_first(found)}); merge it (merge_and_unload) "
            "and save the result."
        )
    if found := [key for key in unexpected if PACKED.search(key)]:
        raise UserError(
            f"{name}: has weights packed by a quantizer ({_first(found)}), but no quantization_config for them."
        )
    if found := sorted(key for key in info["missing_keys"] if not _is_spare_scale(key, model)):
        raise UserError(f"{name}: lacks tensors of the model ({_first(found)}).")
    if found := sorted(info["mismatched_keys"]):
        shapes = [f"{key}: {list(in_file)}, not {list(in_model)}" for key, in_file, in_model in found]
        raise UserError(f"{name}: has tensors of other shapes than in its config ({_first(shapes)}).")
    if found := [key for key in unexpected if _is_of_decoder(key, model)]:
        raise UserError(
            f"{name}: has tensors that {type(model).__name__} does not have ({_first(found)}); ignoring them would "
            "change the model."
        )
    if info.get("error_msgs"):
        raise UserError(f"{name}: cannot be loaded: {' '.join(str(info['error_msgs'][0]).split())}")


def _first(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _is_spare_scale(key: str, model: PreTrainedModel) -> bool:
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return method == "quanto" and key.rpartition(".")[2] in _QUANTO_SCALES


def _is_of_decoder(key: str, model: PreTrainedModel) -> bool:
    """Return whether a key belongs to the text model, and not to another head or to a vision or audio part."""
    layer = _IN_LAYER.search(key)
    start = key[: layer.start()] if layer else key
    if _OF_OTHER_MODALITIES.search(start):
        return False
    if layer is None:
        return key.startswith((f"{model.base_model_prefix}.", f"{DEPTH_READS}."))
    config = model.config.get_text_config()
    num_extra = next((extra for name in _NUM_EXTRA_LAYERS if (extra := getattr(config, name, None))), 0)
    num_layers = config.num_hidden_layers
    return "mtp" not in start and not num_layers <= int(layer[1]) < num_layers + num_extra
