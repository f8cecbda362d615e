"""What a conversion starts from: a folder or a Hub repository, its config, and its architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_depthattn.checkpoint_keys import BASE_MODEL_NAMES
from hf_depthattn.configuration_depthattn import DepthAttnConfig
from hf_depthattn.conversion.checkpoint_files import (
    INDEX_FILE,
    SINGLE_FILE,
    ConversionError,
    WeightFiles,
    read_json,
    read_weight_map,
)
from hf_depthattn.conversion.command_errors import one_line
from hf_depthattn.conversion.output_folder import CARRIED_FOLDERS, CARRIED_PATTERNS
from hf_depthattn.host_layouts import host_layout
from hf_depthattn.remote_code import AUTO_MAP


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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LAYER_KEY = re.compile(r"^((?:.*?\.)?)layers\.(\d+)\.")


def find_folder(source: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a checkpoint; one that is named by its Hub id is downloaded.

    Args:
        source: a local folder, or a Hub id (`owner/name`).
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The folder, and the Hub id if it was one.

    Raises:
        ConversionError: neither of the two, or the Hub does not give it.
    """
    if not str(source).strip():
        raise ConversionError("source: is empty; give a folder or a Hub id.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"revision: {revision!r} has no meaning for the local folder {folder}.")
        return folder, None
    name = str(source)
    if folder.exists():
        raise ConversionError(f"{name}: is a file; give the checkpoint folder.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name):
        raise ConversionError(f"{name}: no such folder.")
    return _download(name, revision), name


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    chat_templates = [f"{folder}/*" for folder in CARRIED_FOLDERS]
    small_files = [*CARRIED_PATTERNS, *chat_templates, "README.md", "*.py"]
    # A pattern's `*` crosses folders, and repositories keep other formats in theirs.
    elsewhere = ["original/*", "onnx/*", "gguf/*", "openvino/*", "coreml/*", "checkpoint-*/*"]
    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=small_files, ignore_patterns=elsewhere)
        )
        index = folder / INDEX_FILE
        shards = [SINGLE_FILE, *(sorted(set(read_weight_map(index).values())) if index.is_file() else ())]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=shards))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConversionError(f"{hub_id}: not a local folder, and not to be had from the Hub: {reason}") from error


def read_host_config(folder: Path) -> PreTrainedConfig:
    """The config of a stock checkpoint that can be a host.

    Args:
        folder: the checkpoint.

    Raises:
        ConversionError: no config, or one that cannot be a host, with the reason.
    """
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type is None:
        raise ConversionError(f"{folder / 'config.json'}: has no 'model_type'.")
    if model_type == DepthAttnConfig.model_type:
        raise ConversionError(f"{folder}: is a depth attention checkpoint already; a stock one is needed here.")
    if model_type not in CONFIG_MAPPING:
        raise ConversionError(
            f"{folder}: model_type {model_type!r} is not known to transformers {transformers.__version__}."
        )
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise ConversionError(
            f"{folder}: is quantised; its weights are packed for a quantiser that knows the stock model only. "
            "Retrofit the unquantised checkpoint, and quantise the result."
        )
    try:
        host_layout(model_type)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # Strict configs raise errors of their own, by transformers, huggingface_hub or the model's config class.
        raise ConversionError(f"{folder}: {one_line(error).removeprefix('text_config: ')}") from error
    # Neither the path of this machine nor code of the source goes into the output.
    config._name_or_path = ""
    for name in ("auto_map", "_commit_hash"):
        config.__dict__.pop(name, None)
    return config


def read_depth_config(folder: Path) -> DepthAttnConfig:
    """The config of a depth attention checkpoint.

    Raises:
        ConversionError: no config, one of something else, or one that is not valid.
    """
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != DepthAttnConfig.model_type:
        raise ConversionError(f"{folder}: is no depth attention checkpoint (its model_type is {model_type!r}).")
    try:
        return DepthAttnConfig.from_pretrained(folder)
    except Exception as error:
        raise ConversionError(f"{folder}: {one_line(error)}") from error


def architecture_of(folder: Path, config: PreTrainedConfig, key_prefix: str) -> Architecture:
    """Which kind of head a stock checkpoint has, by its `architectures`, or by its keys if there are none.

    Raises:
        ConversionError: a head that has no depth attention class.
    """
    names = config.architectures or []
    if not names:
        return next(row for row in ARCHITECTURES if row.suffix == ("ForCausalLM" if key_prefix else "Model"))
    for row in ARCHITECTURES:
        if names[0].endswith(row.suffix):
            return row
    known = ", ".join(f"*{row.suffix}" for row in ARCHITECTURES)
    raise ConversionError(f"{folder}: architecture {names[0]!r} has no depth attention class; known are {known}.")


def depth_architecture_of(folder: Path, config: DepthAttnConfig) -> Architecture:
    """Which kind of head a depth attention checkpoint has.

    Raises:
        ConversionError: `architectures` names no class of this package.
    """
    names = config.architectures or []
    for row in ARCHITECTURES:
        if row.depth_class in names:
            return row
    raise ConversionError(f"{folder}: architectures {names} name no class of this package.")


def key_prefix_of(folder: Path, weights: WeightFiles, num_layers: int) -> str:
    """What stands before `layers.N.` in the keys of a checkpoint.

    `"model."`, `"transformer."` (question-answering heads of many hosts), or nothing (base models).

    Raises:
        ConversionError: other keys, or a layer without a tensor.
    """
    matches = [match for match in map(_LAYER_KEY.match, weights.weight_map) if match]
    if not matches:
        raise ConversionError(f"{folder}: no tensor of a decoder layer ('model.layers.0. ...') in its weights.")
    found = {match[1] for match in matches}
    known_prefixes = (*(f"{name}." for name in BASE_MODEL_NAMES), "")
    prefix = next((known for known in known_prefixes if known in found), None)
    if prefix is None:
        raise ConversionError(
            f"{folder}: its keys start with {matches[0][1]!r} ({matches[0].string}), not with 'model.'; load the "
            "checkpoint as a causal language model or a base model and save that."
        )
    present = {int(match[2]) for match in matches if match[1] == prefix}
    missing = sorted(set(range(num_layers)) - present)
    if missing:
        raise ConversionError(
            f"{folder}: config.json has {num_layers} layers, but the weights have no tensor of layer {missing[0]}."
        )
    return prefix
