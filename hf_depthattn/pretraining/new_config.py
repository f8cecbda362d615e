"""The config of a model that is trained from scratch: any host's config, changes, a tokenizer, depth options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from ..checkpoints.checkpoint_files import read_json
from ..checkpoints.config_check import check_counts
from ..configuration_depthattn import DepthAttnConfig
from ..depth_options import DEPTH_OPTIONS, replace_options
from ..errors import UserError
from ..errors.messages import one_line
from ..utils.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_config(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the config of a host, or of a model with depth attention.

    Args:
        source: a JSON file, a folder with config.json, a model type of transformers (`"llama"`) or a Hub id.

    Returns:
        The fields of the host's config, with `model_type`, and the depth options in the file, which a stock model does
        not have.

    Raises:
        UserError: if there is no such config, or transformers does not know its model type.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = user_path(source)
    if path.exists():
        fields = read_json(path / "config.json" if path.is_dir() else path)
    elif source in CONFIG_MAPPING:
        fields = {"model_type": source}
    else:
        try:
            fields, _ = PreTrainedConfig.get_config_dict(source)
        except OSError as error:
            raise UserError(f"{source}: is no file, folder, model type or model on the Hub.") from error
    host = fields.get("text_config", fields)
    if not isinstance(host, dict) or host.get("model_type") not in CONFIG_MAPPING:
        model_type = host.get("model_type") if isinstance(host, dict) else None
        raise UserError(f"{source}: the model type {model_type!r} is not known to the installed transformers.")
    return dict(host), {name: fields[name] for name in DEPTH_OPTIONS if name in fields}


def field_names(host: dict[str, Any]) -> list[str]:
    """Return the names of the fields of a host's config.

    Args:
        host: the fields of a host's config, as returned by `read_config`.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return list(CONFIG_MAPPING[host["model_type"]].__dataclass_fields__)


def new_config(
    host: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    changes: dict[str, Any] | None = None,
    saved_options: dict[str, Any] | None = None,
    **depth_options: Any,
) -> DepthAttnConfig:
    """Return the config of a new model.

    Args:
        host: the fields of a host's config, as returned by `read_config`.
        tokenizer: the tokenizer; size of the vocabulary and special tokens are taken from it.
        sequence_length: tokens per sequence, which must fit into the host's context.
        changes: fields of the host's config that replace all others.
        saved_options: the depth options beside the host's config, as returned by `read_config`.
        **depth_options: options of `DepthAttnConfig` that replace saved ones.

    Raises:
        UserError: if a value is not allowed.
    """
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {**host, "vocab_size": len(tokenizer), **tokens, **(changes or {})}
    check_counts("host", fields)
    depth_options = {**replace_options(saved_options or {}, depth_options), **depth_options}
    try:
        config = DepthAttnConfig(text_config=fields, **depth_options)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    for name, least, what in (
        ("vocab_size", len(tokenizer), "the size of the tokenizer"),
        ("max_position_embeddings", sequence_length, "the length of the sequences"),
    ):
        value = getattr(config.text_config, name, None)
        if value is not None and value < least:
            raise UserError(f"{name}: {value} must be at least {least}, {what}.")
    return config
