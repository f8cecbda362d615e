"""The architecture of a checkpoint: its head, the classes for it, and the prefix of its keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..checkpoint_keys import BASE_MODEL_NAMES
from ..checkpoints.checkpoint_files import WeightFiles
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..remote_code import AUTO_MAP
from .depth_shards import usual_name


@dataclass(frozen=True)
class Architecture:
    """A kind of head.

    Attributes:
        suffix: end of the names of transformers' classes with this head.
        auto_class: name of the Auto class.
        host_names: transformers' mapping from model type to class name.
    """

    suffix: str
    auto_class: str
    host_names: dict[str, Any]

    @property
    def depth_class(self) -> str:
        """Name of our class with this head."""
        return AUTO_MAP[self.auto_class].rpartition(".")[2]

    def host_class(self, model_type: str) -> str | None:
        """Return the name of transformers' class with this head for a host, or `None`."""
        name = self.host_names.get(model_type)
        return name[0] if isinstance(name, tuple | list) else name


#: Longest suffixes first; the last one is the base model, without a head.
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

#: Config fields of classification heads, which are on the outer config.
LABEL_FIELDS = ("id2label", "label2id", "problem_type")

_LAYER_KEY = re.compile(r"^((?:.*?\.)?)layers\.(\d+)\.")


def architecture_of(folder: Path, config: PreTrainedConfig, key_prefix: str) -> Architecture:
    """Return the architecture of a stock checkpoint, from its `architectures`, or from its keys if there are none.

    Args:
        folder: the checkpoint.
        config: its config.
        key_prefix: the part of its keys before `layers.N.`.

    Raises:
        UserError: if this package has no class with that head, such as for a reward model.
    """
    names = _architecture_names(folder, config)
    if not names:
        return next(row for row in ARCHITECTURES if row.suffix == ("ForCausalLM" if key_prefix else "Model"))
    known = {}
    for row in ARCHITECTURES:
        host_class = row.host_class(config.model_type)
        if host_class is not None:
            # Some old checkpoints spell their class name in another case.
            known[host_class.lower()] = (host_class, row)
    if names[0].lower() not in known:
        if borrowed := _borrowed(names[0], config.model_type):
            return borrowed
        classes = ", ".join(host_class for host_class, _ in known.values())
        raise UserError(
            f"{folder}: architecture {names[0]!r} is not supported with depth attention; supported for "
            f"{config.model_type!r} are {classes}."
        )
    return known[names[0].lower()][1]


def _borrowed(name: str, model_type: str) -> Architecture | None:
    """Return the architecture of a model type that uses another host's classes (`ExaoneForCausalLM` is Llama's)."""
    row = next((row for row in ARCHITECTURES if name.endswith(row.suffix)), None)
    host_class = getattr(transformers, (row and row.host_class(model_type)) or "", None)
    return row if host_class is not None and host_class.config_class.model_type != model_type else None


def host_class_of(folder: Path, config: PreTrainedConfig, architecture: Architecture) -> type[PreTrainedModel]:
    """Return transformers' class for a stock checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.
        architecture: its architecture.

    Raises:
        UserError: if transformers has no such class.
    """
    name = architecture.host_class(config.model_type)
    host_class = getattr(transformers, name, None) if name else None
    if host_class is None:
        raise UserError(f"{folder}: transformers has no {architecture.auto_class} for the host {config.model_type!r}.")
    return cast(type[PreTrainedModel], host_class)


def depth_architecture_of(folder: Path, config: DepthAttnConfig) -> Architecture:
    """Return the architecture of a depth attention checkpoint.

    Args:
        folder: the checkpoint.
        config: its config.

    Raises:
        UserError: if `architectures` does not contain a class of this package.
    """
    names = _architecture_names(folder, config)
    for row in ARCHITECTURES:
        if row.depth_class in names:
            return row
    raise UserError(f"{folder}: architectures {names} do not contain a class of this package.")


def _architecture_names(folder: Path, config: PreTrainedConfig) -> list[str]:
    names = config.architectures or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'config.json'}: architectures is {names!r}, not a list of names.")
    return list(names)


def key_prefix_of(folder: Path, weights: WeightFiles, num_layers: int) -> str:
    """Return the part of a checkpoint's keys before `layers.N.`.

    It is `"model."`, `"transformer."` (question answering heads of many hosts) or empty (base models).

    Args:
        folder: the checkpoint.
        weights: its weight files.
        num_layers: number of decoder layers.

    Raises:
        UserError: if the keys have another prefix, or a layer has no tensors.
    """
    names = (usual_name(name) for name in weights.weight_map)
    matches = [match for match in map(_LAYER_KEY.match, names) if match]
    if not matches:
        raise UserError(f"{folder}: its weights have no tensor of a decoder layer ('model.layers.0. ...').")
    found = {match[1] for match in matches}
    known_prefixes = (*(f"{name}." for name in BASE_MODEL_NAMES), "")
    prefix = next((known for known in known_prefixes if known in found), None)
    if prefix is None:
        raise UserError(
            f"{folder}: its keys start with {matches[0][1]!r} ({matches[0].string}), not with 'model.'; load the "
            "checkpoint as a causal language model or a base model and save it again."
        )
    present = {int(match[2]) for match in matches if match[1] == prefix}
    # At least one of these numbers is missing. The range does not depend on `num_layers`, which could be huge.
    missing = next(layer for layer in range(len(present) + 1) if layer not in present)
    if missing < num_layers:
        raise UserError(
            f"{folder}: config.json has {num_layers} layers, but its weights have no tensor of layer {missing}."
        )
    return prefix
