"""Read and check the checkpoint that is converted or compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoints.adapter_files import check_no_adapter
from ..checkpoints.checkpoint_files import TensorEntry, WeightFiles, read_json, read_weight_files
from ..checkpoints.config_check import check_counts
from ..checkpoints.foreign_tensors import check_no_depth_fields, check_stock_config, check_stock_tensors
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..errors.messages import one_line
from ..host_layouts import REFUSED_HOSTS, host_layout, supported_hosts
from .architecture import Architecture, architecture_of, depth_architecture_of, host_class_of, key_prefix_of


@dataclass(frozen=True)
class Source:
    """What both kinds of checkpoints have.

    Attributes:
        folder: its folder.
        weights: its weight files.
        key_prefix: the part of its keys before `layers.N.`.
        architecture: its architecture.
    """

    folder: Path
    weights: WeightFiles
    key_prefix: str
    architecture: Architecture

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Its tensors by name."""
        return dict(self.weights.entries())


@dataclass(frozen=True)
class StockSource(Source):
    """A stock checkpoint.

    Attributes:
        config: its config, without the path that it was loaded from.
        host_class: transformers' class for it.
    """

    config: PreTrainedConfig
    host_class: type[PreTrainedModel]


@dataclass(frozen=True)
class DepthSource(Source):
    """A depth attention checkpoint.

    Attributes:
        config: its config.
    """

    config: DepthAttnConfig


def read_stock_source(folder: Path, *, ignore_model_code: bool = False) -> StockSource:
    """Read a stock checkpoint, and check that it can be a host and has no tensors of other packages.

    Args:
        folder: the checkpoint.
        ignore_model_code: use transformers' classes for a checkpoint with custom model code.

    Raises:
        UserError: if it is damaged or incomplete, or cannot be a host.
    """
    config = read_host_config(folder, ignore_model_code=ignore_model_code)
    weights = read_weight_files(folder)
    check_stock_tensors(folder, dict(weights.entries()))
    key_prefix = key_prefix_of(folder, weights, config.num_hidden_layers)
    architecture = architecture_of(folder, config, key_prefix)
    host_class = host_class_of(folder, config, architecture)
    return StockSource(folder, weights, key_prefix, architecture, config, host_class)


def read_depth_source(folder: Path) -> DepthSource:
    """Read a depth attention checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if it is damaged or incomplete, or not a depth attention checkpoint.
    """
    config = read_depth_config(folder)
    architecture = depth_architecture_of(folder, config)
    weights = read_weight_files(folder)
    key_prefix = key_prefix_of(folder, weights, config.host_config.num_hidden_layers)
    return DepthSource(folder, weights, key_prefix, architecture, config)


def read_host_config(folder: Path, *, ignore_model_code: bool = False) -> PreTrainedConfig:
    """Return the config of a stock checkpoint, after checking that it can be a host.

    Args:
        folder: the checkpoint.
        ignore_model_code: use transformers' classes for a checkpoint with custom model code.

    Raises:
        UserError: if the config is missing, or cannot be a host.
    """
    check_no_adapter(folder)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == DepthAttnConfig.model_type:
        raise UserError(f"{folder}: is already a depth attention checkpoint; a stock checkpoint is needed here.")
    # First, since most formats with such fields have no model type that transformers knows.
    check_no_depth_fields(folder, raw)
    model_type = _model_type(folder, raw)
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: model_type {model_type!r} is not known to transformers {transformers.__version__}."
        )
    check_counts(str(folder), raw)
    _check_is_text_model(folder, model_type, raw)
    check_stock_config(folder, raw, ignore_model_code=ignore_model_code)
    try:
        host_layout(model_type)
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # transformers, huggingface_hub and the model's config class each raise errors of their own.
        raise UserError(f"{folder}: {one_line(error).removeprefix('text_config: ')}") from error
    # The output must not contain a local path or refer to code of the source.
    config._name_or_path = ""
    for name in ("auto_map", "_commit_hash"):
        config.__dict__.pop(name, None)
    return config


def _model_type(folder: Path, raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    if model_type is None:
        raise UserError(f"{folder / 'config.json'}: has no 'model_type'.")
    if not isinstance(model_type, str):
        raise UserError(f"{folder / 'config.json'}: model_type is {model_type!r}, not a string.")
    return model_type


def _check_is_text_model(folder: Path, model_type: str, raw: dict[str, Any]) -> None:
    """Reject a multimodal model, with instructions to extract its language model."""
    parts = CONFIG_MAPPING[model_type].sub_configs
    if "text_config" not in parts or model_type in supported_hosts():
        return
    text = raw.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    text_type = text_type or getattr(parts["text_config"], "model_type", None)
    message = f"{folder}: {model_type!r} is a multimodal model; only its language model can have depth attention"
    if isinstance(text_type, str) and text_type not in ("", *supported_hosts()):
        reason = REFUSED_HOSTS.get(text_type, "the layout of its decoder layers is not known")
        raise UserError(f"{message}, and {text_type!r} cannot be a host: {reason}.")
    raise UserError(
        f"{message}. Save the language model alone and retrofit it: model = AutoModelForImageTextToText."
        "from_pretrained(SOURCE); text = AutoModelForCausalLM.from_config(model.config.text_config); text.model = "
        "model.get_decoder(); text.lm_head = model.lm_head; text.save_pretrained(FOLDER)"
    )


def read_depth_config(folder: Path) -> DepthAttnConfig:
    """Return the config of a depth attention checkpoint.

    Args:
        folder: the checkpoint.

    Raises:
        UserError: if the config is missing, not valid, or not of a depth attention checkpoint.
    """
    raw = read_json(folder / "config.json")
    model_type = _model_type(folder, raw)
    check_counts(str(folder), raw)
    if model_type != DepthAttnConfig.model_type:
        raise UserError(f"{folder}: is not a depth attention checkpoint (its model_type is {model_type!r}).")
    try:
        return DepthAttnConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder}: {one_line(error)}") from error
