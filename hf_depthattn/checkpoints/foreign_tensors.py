"""Reject stock checkpoints with weights or config fields that a stock model would ignore or misinterpret.

All checks use names in config.json and in the headers of the weights; no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .checkpoint_files import TensorEntry

#: Tensors of PEFT's layers: the checkpoint was saved before the adapter was merged.
OF_AN_ADAPTER = re.compile(
    r"(?:^|\.)(?:base_layer|original_module|modules_to_save|lora_\w+|(?:ada|vera|oft|ia3|hra|boft)_\w+)(?:\.|$)"
    r"|^base_model\.model\."
)
#: Packed weights of quantizers: GPTQ and AWQ, compressed-tensors and FP8, bitsandbytes, MXFP4.
PACKED = re.compile(
    r"\.(?:qweight|qzeros|scales|g_idx|weight_(?:packed|scale\w*|zero_point|shape)|(?:input|output|activation)_scale"
    r"|SCB|\w+_(?:blocks|scales|scale_inv)|weight\.(?:absmax|quant_map|nested_\w+|quant_state\.\w+|_data|_scale))$"
)
#: Buffers that models compute themselves but some checkpoints contain: rotary frequencies, positions, causal masks
#: (`attn.bias` of GPT-2 and similar models, as bytes or booleans).
COMPUTED = re.compile(
    r"(?:inv_freq|cos_cached|sin_cached|masked_bias|position_ids|causal_mask)$|(?:^|\.)(?:attn|attention)\.bias$"
)
#: Parameters of residual schemes, in all public implementations and in this package.
OF_DEPTH = re.compile(
    r"""(?:^|\.)(?:
        (?:\w+_)?res_(?:proj|norm|bias|alpha|gate_logit|gate_proj)(?:\.|$)
        | (?:\w+_)?attnres_logit_scale$
        | attn_res\.
        | (?:attention|mlp|final)_input\.query$
        | (?:\w+_)?hyper_connection\.
        | (?:\w+_)?hc(?:_\w+)?(?:\.|$)
        | (?:attn|mlp)_(?:null_source$|pre_gate\.)
        | (?:mlp|feed_forward)\.kv_proj\.
        | (?:attn|mlp|out)_depth(?:_kv)?\.
        | depth_reads\.
        | value_residual\.
    )""",
    re.VERBOSE,
)
_DEPTH_FIELDS = (
    "attnres_block_size",
    "attn_res_block_size",
    "attnres_mode",
    "n_layers_per_attn_res_block",
    "use_attn_res",
    "hc_mult",
    "moda",
)
# dtypes of unquantised weights, counters and masks, by their names in safetensors.
_UNPACKED_TYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "BOOL")
# Config files of quantizers: AutoGPTQ, AutoAWQ, ModelOpt.
_QUANTISER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISER_FIELDS = ("quantization_config", "compression_config")
_IMPORT = "Checkpoints of some projects can be imported: depthattn import SOURCE OUT (docs/importing.md)"
_UNQUANTISED = "Retrofit the unquantised checkpoint and quantise the result."
# Entries of `auto_map` other than model code.
_PROCESSORS = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")


def check_stock_config(folder: Path, config: dict[str, Any], *, ignore_model_code: bool = False) -> None:
    """Check that a stock checkpoint's config describes a model of transformers without modifications.

    Args:
        folder: the checkpoint.
        config: its config.json.
        ignore_model_code: use the classes of transformers for a checkpoint with custom model code.

    Raises:
        UserError: if it is quantised or has custom model code.
    """
    check_not_quantised(folder, config)
    auto_map = config.get("auto_map")
    code = {k: v for k, v in auto_map.items() if k not in _PROCESSORS} if isinstance(auto_map, dict) else auto_map
    if code and not ignore_model_code:
        shown = next(iter(code.values())) if isinstance(code, dict) else code
        raise UserError(
            f"{folder}: has its own model code (auto_map in config.json: {shown}), which may compute something "
            "different from transformers' class; to use it anyway: `ignore_model_code=True`, --ignore-model-code."
        )


def check_not_quantised(folder: Path, config: Mapping[str, Any], advice: str = _UNQUANTISED) -> None:
    """Check that a config.json and the files beside it do not describe a quantised checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.json.
        advice: what to do, for the message.

    Raises:
        UserError: if it is quantised.
    """
    if field := next((name for name in _QUANTISER_FIELDS if config.get(name)), None):
        raise UserError(
            f"{folder}: is quantised ({field} in config.json); its packed weights can only be loaded into the model "
            f"that they were made from. {advice}"
        )
    if file := next((name for name in _QUANTISER_FILES if (folder / name).is_file()), None):
        raise UserError(f"{folder}: is quantised ({file}). {advice}")


def check_no_depth_fields(folder: Path, config: Mapping[str, Any], parent: str = "") -> None:
    """Check that a config.json has no field of a residual scheme, in sub-configs either.

    Args:
        folder: the checkpoint.
        config: its config.json, or a part of it.
        parent: names of the parts that contain this part, with a dot after each.

    Raises:
        UserError: if it has one; the message names the field.
    """
    for name, value in config.items():
        if name in _DEPTH_FIELDS and value not in (None, False):
            shown = "..." if isinstance(value, dict) else repr(value)
            raise UserError(
                f"{folder}: {parent}{name}={shown} in config.json: it was trained with a residual scheme that the "
                f"stock model does not have. {_IMPORT}."
            )
        if isinstance(value, dict):
            check_no_depth_fields(folder, value, f"{parent}{name}.")


def check_stock_tensors(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Check that a stock checkpoint has only tensors of stock models.

    Args:
        folder: the checkpoint.
        entries: its tensors by name.

    Raises:
        UserError: if it has tensors of an adapter that was not merged, of a quantizer, or of a residual scheme.
    """
    names = sorted(entries)
    for pattern, reason in (
        (OF_AN_ADAPTER, "belongs to an adapter that was not merged; merge it (merge_and_unload) and save the result"),
        (PACKED, f"packed by a quantizer. {_UNQUANTISED.rstrip('.')}"),
        (OF_DEPTH, f"belongs to a residual scheme that the stock model does not have. {_IMPORT}"),
    ):
        found = [name for name in names if pattern.search(name)]
        if found:
            count = "tensor" if len(found) == 1 else f"{len(found)} tensors, first"
            raise UserError(f"{folder}: {count} {found[0]!r}: {reason}.")
    check_types(folder, entries)


def check_types(folder: Path | str, entries: Mapping[str, TensorEntry]) -> None:
    """Check that a checkpoint without a quantization config has no packed weights, which would load as plain numbers.

    Args:
        folder: the checkpoint; its name in messages.
        entries: its tensors by name.

    Raises:
        UserError: if it has packed weights; the message names the first tensor.
    """
    for name, entry in entries.items():
        if entry.dtype not in _UNPACKED_TYPES and not COMPUTED.search(name):
            raise UserError(
                f"{folder}: tensor {name!r} has the dtype {entry.dtype}: packed by a quantizer that config.json does "
                "not name. Use the unquantised checkpoint."
            )
