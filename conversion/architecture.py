"""The architecture of a checkpoint: which head it has, the classes for it, and how its keys start."""

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
    """A kind of head: how its classes end on the host's side, and where they are registered."""

    suffix: str
    auto_class: str
    host_names: dict[str, Any]

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
    return cast(type[PreTrainedModel], host_class)


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
