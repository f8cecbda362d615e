"""The README.md of a retrofitted checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import metadata_load

from hf_depthattn.configuration_depthattn import DepthAttnConfig
from hf_depthattn.depth_options import DepthConnectionType, DepthKVType

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

{source} with {additions}.
The weights are those of the source. The {num_depth_parameters:,} depth parameters are new, and they start where the
model computes what its source computes; only training moves it.

| | |
|---|---|
{rows}

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With the package `hf-depthattn` installed and `import hf_depthattn`, `trust_remote_code` is not needed.
`depthattn verify SOURCE {name}` compares it with its source; `depthattn restore {name} HOST_DIR` gives the source back
{condition}.
{papers}"""


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
    schemes = _schemes(config)
    tags = ["custom_code", "hf-depthattn", *(scheme.tag for scheme in schemes)]
    metadata: dict = {"library_name": "transformers", "tags": tags}
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
        additions=" and ".join(scheme.words(config) or "" for scheme in schemes) or describe_connection(config),
        num_depth_parameters=num_depth_parameters,
        rows="\n".join(f"| {name} | {value} |" for name, value in _rows(config)),
        auto_class=auto_class,
        name=name,
        condition=f"as long as {' and '.join(scheme.condition for scheme in schemes)}" if schemes else "at any time",
        papers="".join(f"\n{scheme.paper}\n" for scheme in schemes),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def describe_connection(config: DepthAttnConfig) -> str:
    """The connection of a config in a few words."""
    if config.connection == DepthConnectionType.RESIDUAL:
        return "plain residual sums" + (" (the control)" if config.depth_kv is None else "")
    size = config.block_size_sublayers
    return "Full Attention Residuals" if size == 1 else f"Block Attention Residuals ({size} sublayers per block)"


def describe_depth_kv(config: DepthAttnConfig) -> str | None:
    """MoDA as a config has it in a few words, `None` without it."""
    if config.depth_kv is None:
        return None
    kinds = "attention and MLP" if config.depth_kv == DepthKVType.ATTENTION_MLP else "attention"
    newest = "" if config.num_depth_slots is None else f", the newest {config.num_depth_slots}"
    gated = ", one gate per head" if config.depth_gate else ", no gate"
    return f"Mixture-of-Depths Attention (slots of {kinds} sublayers{newest}{gated})"


class _Scheme(NamedTuple):
    """What the card says of a scheme.

    Attributes:
        words: the scheme of a config in a few words.
        tag: among the metadata.
        condition: what `restore` asks for.
        paper: the last line.
    """

    words: Callable[[DepthAttnConfig], str | None]
    tag: str
    condition: str
    paper: str


_ATTN_RES = _Scheme(
    describe_connection,
    "attention-residuals",
    "the queries are zero",
    "Attention Residuals: [arXiv 2603.15031](https://arxiv.org/abs/2603.15031).",
)
_MODA = _Scheme(
    describe_depth_kv,
    "mixture-of-depths-attention",
    "the gates are zero",
    "Mixture-of-Depths Attention: [arXiv 2603.15619](https://arxiv.org/abs/2603.15619).",
)


def _schemes(config: DepthAttnConfig) -> list[_Scheme]:
    present = {_ATTN_RES: config.connection == DepthConnectionType.ATTN_RES, _MODA: config.depth_kv is not None}
    return [scheme for scheme, is_present in present.items() if is_present]


def _rows(config: DepthAttnConfig) -> list[tuple[str, str]]:
    rows = [("host", f"`{config.text_config.model_type}`, {config.text_config.num_hidden_layers} layers")]
    if config.connection == DepthConnectionType.ATTN_RES:
        rows += [
            ("connection", f'`{config.connection}`, `read_scale="{config.read_scale}"`'),
            ("sublayers per block", f"{config.block_size_sublayers} of {config.num_sublayers}"),
        ]
    else:
        rows.append(("connection", f"`{config.connection}`"))
    if config.depth_kv is not None:
        rows += [
            ("depth slots", f"`{config.depth_kv}`, at most {max(config.depth_slot_plan.num_read)} read by a layer"),
            ("depth keys", f"rotation `{config.depth_key_rope}`, norm of the `{config.depth_key_norm}`"),
            ("gate", f"`{config.depth_gate}`, zero at the start"),
        ]
    return rows


def _kept_metadata(card: Path) -> dict:
    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}
    return {key: metadata[key] for key in _KEPT_METADATA if key in metadata}
