"""The README.md of a retrofitted checkpoint."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from hf_depthattn.configuration_depthattn import DepthAttnConfig, DepthConnectionType

# What the source's card says about its licence and languages holds for the copy too.
_KEPT_METADATA = ("license", "license_name", "license_link", "language")
_PIPELINE_TAGS = {
    "DepthAttnForCausalLM": "text-generation",
    "DepthAttnForSequenceClassification": "text-classification",
    "DepthAttnForTokenClassification": "token-classification",
    "DepthAttnForQuestionAnswering": "question-answering",
}

_TEMPLATE = """\
---
{metadata}---

# {title}

{source} with {connection}.
The weights are those of the source. The {num_depth_parameters:,} depth parameters are new, and they start where the
model computes what its source computes; only training moves it.

| | |
|---|---|
| host | `{model_type}`, {num_layers} layers |
| connection | `{connection_name}`, `read_scale="{read_scale}"` |
| sublayers per block | {sublayers_per_block} of {num_sublayers} |

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With the package `hf-depthattn` installed and `import hf_depthattn`, `trust_remote_code` is not needed.
`depthattn verify SOURCE {name}` compares it with its source; `depthattn restore {name} HOST_DIR` gives the source back
as long as the queries are zero.

Attention Residuals: [arXiv 2603.15031](https://arxiv.org/abs/2603.15031).
"""


def write_model_card(
    folder: Path,
    config: DepthAttnConfig,
    *,
    name: str,
    hub_id: str | None,
    source_folder: Path,
    depth_class: str,
    auto_class: str,
    num_depth_parameters: int,
) -> None:
    """Write the model card of a retrofitted checkpoint.

    Args:
        folder: where to write README.md.
        config: the checkpoint's config.
        name: how the checkpoint is called, the name of its folder.
        hub_id: the source on the Hub, if it came from there.
        source_folder: the source, whose card names licence and languages.
        depth_class: our class.
        auto_class: the Auto class that loads it.
        num_depth_parameters: number of new parameters.
    """
    metadata = {"library_name": "transformers", "tags": ["custom_code", "hf-depthattn", "attention-residuals"]}
    if hub_id is not None:
        metadata["base_model"] = hub_id
        metadata["base_model_relation"] = "finetune"
    if depth_class in _PIPELINE_TAGS:
        metadata["pipeline_tag"] = _PIPELINE_TAGS[depth_class]
    metadata |= _kept_metadata(source_folder / "README.md")
    text = _TEMPLATE.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=name,
        source=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "A stock checkpoint",
        connection=describe_connection(config),
        num_depth_parameters=num_depth_parameters,
        model_type=config.text_config.model_type,
        num_layers=config.text_config.num_hidden_layers,
        connection_name=config.connection,
        read_scale=config.read_scale,
        sublayers_per_block=config.block_size_sublayers,
        num_sublayers=config.num_sublayers,
        auto_class=auto_class,
        name=name,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def describe_connection(config: DepthAttnConfig) -> str:
    """The connection of a config in a few words."""
    if config.connection == DepthConnectionType.RESIDUAL:
        return "plain residual sums (the control)"
    size = config.block_size_sublayers
    return "Full Attention Residuals" if size == 1 else f"Block Attention Residuals ({size} sublayers per block)"


def _kept_metadata(card: Path) -> dict:
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}
    return {key: metadata[key] for key in _KEPT_METADATA if key in metadata}
