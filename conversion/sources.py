"""What a conversion starts from: the config of a checkpoint and its architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint_keys import BASE_MODEL_NAMES
from ..checkpoints.checkpoint_files import WeightFiles, read_json
from ..checkpoints.config_fields import check_counts
from ..checkpoints.foreign_tensors import check_no_adapter, check_stock_config
from ..checkpoints.source_folder import find_folder
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..errors.messages import one_line
from ..host_layouts import REFUSED_HOSTS, host_layout, supported_hosts
from ..remote_code import AUTO_MAP
from .depth_shards import usual_name

__all__ = [
    "ARCHITECTURES",
    "LABEL_FIELDS",
    "Architecture",
    "architecture_of",
    "depth_architecture_of",
    "find_folder",
    "host_class_of",
    "key_prefix_of",
    "one_line",
    "read_depth_config",
    "read_host_config",
]


@dataclass(frozen=True)
class Architecture:
    """A kind of head: how its classes end on the host's side, and where they are registered."""

    suffix: str
    auto_class: str
    host_names: dict

    @property
    def depth_class(self) -> str:
        """Our class."""
        return AUTO_MAP[self.auto_class].rpartition(".")[2]

    def host_class(self, model_type: str) -> str | None:
        """transformers' class with this head for a host, if it has one."""
        name = self.host_names.get(model_type)
        return name[0] if isinstance(name, tuple | list) else name


#: The longest suffixes first: every one but the last belongs to a head.
ARCHITECTURES = (
    Architecture("ForCausalLM", "AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    Architecture(
        "ForSequenceClassification",
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    Architecture(
        "ForTokenClassification",
        "AutoModelForTokenClassification",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    Architecture(
        "ForQuestionAnswering",
        "AutoModelForQuestionAnswering",
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    Architecture("Model", "AutoModel", modeling_auto.MODEL_MAPPING_NAMES),
)

#: Config fields that a classification head keeps on the outer config.
LABEL_FIELDS = ("id2label", "label2id", "problem_type")

_LAYER_KEY = re.compile(r"^((?:.*?\.)?)layers\.(\d+)\.")


def read_host_config(folder: Path, *, ignore_model_code: bool = False) -> PreTrainedConfig:
    """The config of a stock checkpoint that can be a host.

    Args:
        folder: the checkpoint.
        ignore_model_code: take transformers' classes for a checkpoint that brings its own.

    Raises:
        UserError: no config, or one that cannot be a host, with the reason.
    """
    check_no_adapter(folder)
    raw = read_json(folder / "config.json")
    model_type = _model_type(folder, raw)
    if model_type == DepthAttnConfig.model_type:
        raise UserError(f"{folder}: is a depth attention checkpoint already; a stock one is needed here.")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder}: model_type {model_type!r} is not known to transformers {transformers.__version__}."
        )
    check_counts(str(folder), raw)
    _check_is_text_model(folder, model_type, raw)
    check_stock_config(folder, raw, ignore_model_code=ignore_model_code)
    try:
        host_layout(model_type)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Strict configs raise errors of their own, by transformers, huggingface_hub or the model's config class.
        raise UserError(f"{folder}: {one_line(error).removeprefix('text_config: ')}") from error
    # Neither the path of this machine nor code of the source goes into the output.
    config._name_or_path = ""
    for name in ("auto_map", "_commit_hash"):
        config.__dict__.pop(name, None)
    return config


def _model_type(folder: Path, raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    if model_type is None:
        raise UserError(f"{folder / 'config.json'}: has no 'model_type'.")
    if not isinstance(model_type, str):
        raise UserError(f"{folder / 'config.json'}: model_type is {model_type!r}, not a name.")
    return model_type


def _check_is_text_model(folder: Path, model_type: str, raw: dict[str, Any]) -> None:
    """Refuse a model of several parts, with how to get at its language model."""
    parts = CONFIG_MAPPING[model_type].sub_configs
    if "text_config" not in parts or model_type in supported_hosts():
        return
    text = raw.get("text_config")
    text_type = text.get("model_type") if isinstance(text, dict) else None
    text_type = text_type or getattr(parts["text_config"], "model_type", None)
    message = f"{folder}: {model_type!r} is a multimodal model; depth attention goes into its language model"
    if isinstance(text_type, str) and text_type not in ("", *supported_hosts()):
        reason = REFUSED_HOSTS.get(text_type, "no sublayer layout is known for it")
        raise UserError(f"{message}, and {text_type!r} cannot be a host: {reason}.")
    raise UserError(
        f"{message}. Save that by itself and retrofit the result: model = AutoModelForImageTextToText."
        "from_pretrained(SOURCE); text = AutoModelForCausalLM.from_config(model.config.text_config); text.model = "
        "model.get_decoder(); text.lm_head = model.lm_head; text.save_pretrained(FOLDER)"
    )


def read_depth_config(folder: Path) -> DepthAttnConfig:
    """The config of a depth attention checkpoint.

    Raises:
        UserError: no config, one of something else, or one that is not valid.
    """
    raw = read_json(folder / "config.json")
    model_type = _model_type(folder, raw)
    check_counts(str(folder), raw)
    if model_type != DepthAttnConfig.model_type:
        raise UserError(f"{folder}: is no depth attention checkpoint (its model_type is {model_type!r}).")
    try:
        return DepthAttnConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder}: {one_line(error)}") from error


def architecture_of(folder: Path, config: PreTrainedConfig, key_prefix: str) -> Architecture:
    """Which kind of head a stock checkpoint has, by its `architectures`, or by its keys if there are none.

    Raises:
        UserError: a class that no class of this package replaces, such as a reward model.
    """
    names = _architecture_names(folder, config)
    if not names:
        return next(row for row in ARCHITECTURES if row.suffix == ("ForCausalLM" if key_prefix else "Model"))
    known = {}
    for row in ARCHITECTURES:
        host_class = row.host_class(config.model_type)
        if host_class is not None:
            # Some old checkpoints write their class in another case.
            known[host_class.lower()] = (host_class, row)
    if names[0].lower() not in known:
        if borrowed := _borrowed(names[0], config.model_type):
            return borrowed
        classes = ", ".join(host_class for host_class, _ in known.values())
        raise UserError(
            f"{folder}: architecture {names[0]!r} has no depth attention class; those of {config.model_type!r} that "
            f"have one are {classes}."
        )
    return known[names[0].lower()][1]


def _borrowed(name: str, model_type: str) -> Architecture | None:
    """The kind of a class that transformers has under the name of another host: `ExaoneForCausalLM` is Llama's."""
    row = next((row for row in ARCHITECTURES if name.endswith(row.suffix)), None)
    host_class = getattr(transformers, (row and row.host_class(model_type)) or "", None)
    return row if host_class is not None and host_class.config_class.model_type != model_type else None


def host_class_of(folder: Path, config: PreTrainedConfig, architecture: Architecture) -> type[PreTrainedModel]:
    """transformers' class of a stock checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.
        architecture: the kind of head.

    Raises:
        UserError: transformers has none.
    """
    name = architecture.host_class(config.model_type)
    host_class = getattr(transformers, name, None) if name else None
    if host_class is None:
        raise UserError(f"{folder}: transformers has no {architecture.auto_class} for the host {config.model_type!r}.")
    return host_class


def depth_architecture_of(folder: Path, config: DepthAttnConfig) -> Architecture:
    """Which kind of head a depth attention checkpoint has.

    Raises:
        UserError: `architectures` names no class of this package.
    """
    names = _architecture_names(folder, config)
    for row in ARCHITECTURES:
        if row.depth_class in names:
            return row
    raise UserError(f"{folder}: architectures {names} name no class of this package.")


def _architecture_names(folder: Path, config: PreTrainedConfig) -> list[str]:
    names = config.architectures or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures is {names!r}, not a list of names.")
    return list(names)


def key_prefix_of(folder: Path, weights: WeightFiles, num_layers: int) -> str:
    """What stands before `layers.N.` in the keys of a checkpoint.

    `"model."`, `"transformer."` (question-answering heads of many hosts), or nothing (base models).

    Raises:
        UserError: other keys, or a layer without a tensor.
    """
    names = (usual_name(name) for name in weights.weight_map)
    matches = [match for match in map(_LAYER_KEY.match, names) if match]
    if not matches:
        raise UserError(f"{folder}: no tensor of a decoder layer ('model.layers.0. ...') in its weights.")
    found = {match[1] for match in matches}
    known_prefixes = (*(f"{name}." for name in BASE_MODEL_NAMES), "")
    prefix = next((known for known in known_prefixes if known in found), None)
    if prefix is None:
        raise UserError(
            f"{folder}: its keys start with {matches[0][1]!r} ({matches[0].string}), not with 'model.'; load the "
            "checkpoint as a causal language model or a base model and save that."
        )
    present = {int(match[2]) for match in matches if match[1] == prefix}
    # One of these numbers is not among so many: a number of layers that no model has is not counted to.
    missing = next(layer for layer in range(len(present) + 1) if layer not in present)
    if missing < num_layers:
        raise UserError(
            f"{folder}: config.json has {num_layers} layers, but the weights have no tensor of layer {missing}."
        )
    return prefix
