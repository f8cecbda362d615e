"""The model card (README.md) of a saved model."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from .configuration_depthattn import DepthAttnConfig
from .depth_connections import connection_class
from .depth_options import DEPTH_OPTIONS, DepthConnectionType, DepthKVType
from .remote_code import AUTO_MAP

CARD_NAME = "README.md"

# Metadata that is copied from the card of the source.
_KEPT_METADATA = ("license", "license_name", "license_link", "language")
# Tag of every model of this package.
_PACKAGE_TAG = "hf-depthattn"
_PIPELINE_TAGS = {
    "DepthAttnForCausalLM": "text-generation",
    "DepthAttnForSequenceClassification": "text-classification",
    "DepthAttnForTokenClassification": "token-classification",
    "DepthAttnForQuestionAnswering": "question-answering",
}

# Text of the card that transformers uploads for a model without one.
_EMPTY_CARD = "that has been pushed on the Hub. This model card has been automatically generated"

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ source }} with {{ additions }}.

{{ table }}

{{ loading }}
{{ papers }}"""


def write_missing_card(
    folder: str | os.PathLike, config: DepthAttnConfig, *, depth_class: str, name: str, tags: Iterable[str] = ()
) -> None:
    """Write README.md into a folder that has none, or only the placeholder of transformers.

    Args:
        folder: a folder with a saved model.
        config: the model's config; base model and licence are read from the card of the folder it was loaded from.
        depth_class: name of the model's class in this package.
        name: name of the repository or folder.
        tags: additional tags.
    """
    card = Path(folder) / CARD_NAME
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if _EMPTY_CARD not in text:
            return
        tags = [*tags, *(_metadata_of(card).get("tags") or [])]
    origin = config.name_or_path or ""
    source_card = Path(origin) / CARD_NAME
    base_model = hub_id_of(origin) or _metadata_of(source_card).get("base_model")
    source_tags = _metadata_of(source_card).get("tags")
    if isinstance(source_tags, list) and _PACKAGE_TAG in source_tags:
        # Tags of a stock model need not be true of a model with depth attention (engines, formats).
        tags = [*tags, *source_tags]
    text = ModelCard.from_template(
        card_data(config, depth_class=depth_class, base_model=base_model, source_card=source_card, tags=tags),
        template_str=_TEMPLATE,
        title=name.rpartition("/")[2],
        source=link_to(base_model) or f"A `{config.text_config.model_type}` model",
        additions=additions(config),
        table=table(config),
        loading=how_to_load(name, depth_class),
        papers=papers(config),
    )
    temporary = card.with_name(f"{CARD_NAME}.{os.getpid()}.tmp")
    text.save(temporary)
    os.replace(temporary, card)


def tags_of(config: DepthAttnConfig) -> list[str]:
    """Return the tags of every card of a model with this config."""
    return ["custom_code", _PACKAGE_TAG, *(scheme.tag for scheme in schemes_of(config))]


def papers(config: DepthAttnConfig) -> str:
    """Return the references to the papers of a config, one paragraph each."""
    return "".join(f"\n{scheme.paper}\n" for scheme in schemes_of(config))


def card_data(
    config: DepthAttnConfig,
    *,
    depth_class: str,
    base_model: str | list[str] | None,
    source_card: Path,
    tags: Iterable[str] = (),
) -> ModelCardData:
    """Return the metadata of a card.

    Args:
        config: the model's config.
        depth_class: name of the model's class in this package.
        base_model: Hub id of the base model, if known.
        source_card: the card of the source, which need not exist.
        tags: additional tags.
    """
    source = _metadata_of(source_card)
    return ModelCardData(
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune",
        library_name="transformers",
        pipeline_tag=_PIPELINE_TAGS.get(depth_class),
        tags=list(dict.fromkeys([*tags_of(config), *tags])),
        **{key: source[key] for key in _KEPT_METADATA if key in source},
    )


def hub_id_of(origin: str) -> str | None:
    """Return what a model was loaded from if that is a Hub id, otherwise `None`.

    Args:
        origin: `name_or_path` of the model or config.
    """
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", origin) is not None and not Path(origin).exists()
    return origin if is_on_hub else None


def link_to(base_model: str | list[str] | None) -> str | None:
    """Return a Markdown link to a model on the Hub, or `None` if there is not exactly one base model."""
    return f"[{base_model}](https://huggingface.co/{base_model})" if isinstance(base_model, str) else None


def how_to_load(name: str, depth_class: str) -> str:
    """Return the code that loads a model and its tokenizer, as Markdown.

    Args:
        name: a folder or a repository.
        depth_class: name of the model's class in this package.
    """
    auto_classes = {reference.rpartition(".")[2]: auto_class for auto_class, reference in AUTO_MAP.items()}
    auto_class = auto_classes.get(depth_class, "AutoModel")
    # The tokenizer needs `trust_remote_code` too: it loads the model's config, and would otherwise ask at a prompt.
    return f"""\
```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

With the package `hf-depthattn` installed and `import hf_depthattn`, `trust_remote_code` is not needed."""


def additions(config: DepthAttnConfig) -> str:
    """Describe in a few words what a config adds to its host."""
    return " and ".join(scheme.words for scheme in schemes_of(config)) or describe_connection(config)


def table(config: DepthAttnConfig) -> str:
    """Return the options of a config as a Markdown table."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _rows(config))])


def describe_connection(config: DepthAttnConfig) -> str:
    """Describe the connection of a config in a few words."""
    return connection_class(config).describe(config)


def describe_depth_kv(config: DepthAttnConfig) -> str | None:
    """Describe MoDA of a config in a few words, or return `None` without MoDA."""
    if config.depth_kv is None:
        return None
    kinds = "attention and MLP" if config.depth_kv == DepthKVType.ATTENTION_MLP else "attention"
    some = "" if config.num_depth_slots is None else f", the newest {config.num_depth_slots}"
    if config.depth_slots is not None:
        some = f", at most {max(config.depth_slot_plan.num_read)} chosen in a layer"
    gated = ", one gate per head" if config.depth_gate else ", no gate"
    return f"Mixture-of-Depths Attention (slots of {kinds} sublayers{some}{gated})"


class Scheme(NamedTuple):
    """A connection, MoDA or the value residual in a model card.

    Attributes:
        words: a description in a few words.
        tag: tag in the metadata.
        condition: the condition under which `restore` works; empty if it always does.
        paper: reference to the paper.
    """

    words: str
    tag: str
    condition: str
    paper: str


def schemes_of(config: DepthAttnConfig) -> list[Scheme]:
    """Return the schemes of a config; empty for the control."""
    schemes = []
    connection = connection_class(config)
    if connection.tag:
        schemes.append(
            Scheme(connection.describe(config), connection.tag, connection.host_condition, connection.paper)
        )
    if (words := describe_depth_kv(config)) is not None:
        paper = "Mixture-of-Depths Attention: [arXiv 2603.15619](https://arxiv.org/abs/2603.15619)."
        schemes.append(Scheme(words, "mixture-of-depths-attention", "the gates are zero", paper))
    if config.value_residual:
        paper = "Value residual (ResFormer): [arXiv 2410.17897](https://arxiv.org/abs/2410.17897)."
        condition = "the factors of the value residual are 0 and 1"
        schemes.append(Scheme("value residual", "value-residual", condition, paper))
    return schemes


def _rows(config: DepthAttnConfig) -> list[tuple[str, str]]:
    rows = [("host", f"`{config.text_config.model_type}`, {config.text_config.num_hidden_layers} layers")]
    if config.connection == DepthConnectionType.ATTN_RES:
        rows += [
            ("connection", f'`{config.connection}`, `read_scale="{config.read_scale}"`'),
            ("sublayers per block", f"{config.block_size_sublayers} of {config.num_sublayers}"),
        ]
    else:
        rows.append(("connection", f"`{config.connection}`"))
        own = [name for name, option in DEPTH_OPTIONS.items() if config.connection in option.connections]
        rows += [(name, _value(config, name)) for name in own]
    if config.depth_kv is not None:
        rows += [
            ("depth slots", f"`{config.depth_kv}`, at most {max(config.depth_slot_plan.num_read)} read by a layer"),
            ("depth keys", f"rotation `{config.depth_key_rope}`, norm of the `{config.depth_key_norm}`"),
            ("gate", "none" if config.depth_gate is None else f"`{config.depth_gate}`, zero before training"),
        ]
    if config.norm_eps_overrides:
        epsilons = [f"`{name}` {eps}" for name, eps in config.norm_eps_overrides.items()]
        rows.append(("epsilon of norms", ", ".join(epsilons)))
    if config.value_residual:
        rows.append(("value residual", f"factors start as in `{config.value_residual_init}`"))
    return rows


def _value(config: DepthAttnConfig, name: str) -> str:
    value = config.resolved_depth_norm_eps if name == "depth_norm_eps" else getattr(config, name)
    return "that of the paper" if value is None else f"`{value}`"


def _metadata_of(card: Path) -> dict:
    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}
