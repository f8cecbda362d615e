"""The model cards (README.md) of retrofitted and imported checkpoints."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_depthattn import DepthAttnConfig
from ..model_card import CARD_NAME, additions, card_data, how_to_load, link_to, papers, schemes_of, table

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ source }} with {{ additions }}.
The weights are those of the source. The {{ num_depth_parameters }} depth parameters are new and not trained: the model
computes the same function as its source.

{{ table }}

{{ loading }}
`depthattn verify SOURCE {{ folder }}` compares it with its source.
`depthattn restore {{ folder }} HOST_DIR` restores the source {{ condition }}.
{{ papers }}"""


def write_model_card(
    folder: Path,
    config: DepthAttnConfig,
    *,
    name: str,
    repository: str | None,
    hub_id: str | None,
    source_folder: Path,
    depth_class: str,
    num_depth_parameters: int,
) -> None:
    """Write the model card of a retrofitted checkpoint.

    Args:
        folder: the folder for README.md.
        config: the checkpoint's config.
        name: name of the checkpoint and of its folder.
        repository: Hub id of the repository that the checkpoint is for, if any.
        hub_id: Hub id of the source, if it is from the Hub.
        source_folder: folder of the source; its card contains licence and languages.
        depth_class: name of the model's class in this package.
        num_depth_parameters: number of new parameters.
    """
    conditions = [scheme.condition for scheme in schemes_of(config) if scheme.condition]
    card = ModelCard.from_template(
        card_data(config, depth_class=depth_class, base_model=hub_id, source_card=source_folder / CARD_NAME),
        template_str=_TEMPLATE,
        title=name,
        source=link_to(hub_id) or "A stock checkpoint",
        additions=additions(config),
        num_depth_parameters=f"{num_depth_parameters:,}",
        table=table(config),
        loading=how_to_load(repository or name, depth_class),
        folder=name,
        condition=f"as long as {' and '.join(conditions)}" if conditions else "at any time",
        papers=papers(config),
    )
    card.save(folder / CARD_NAME)


_CONVERTED_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ source }} with {{ additions }}, {{ how }}.
The weights are those of the source under other names; the model computes the same function.

{{ table }}

{{ loading }}
{{ papers }}"""


def write_import_card(
    folder: Path,
    config: DepthAttnConfig,
    *,
    name: str,
    hub_id: str | None,
    source_folder: Path,
    depth_class: str,
    project: str,
) -> None:
    """Write the model card of an imported checkpoint.

    Args:
        folder: the folder for README.md.
        config: the checkpoint's config.
        name: name of the checkpoint and of its folder.
        hub_id: Hub id of the source, if it is from the Hub.
        source_folder: folder of the source; its card contains licence and languages.
        depth_class: name of the model's class in this package.
        project: the project whose code trained the source.
    """
    _write_converted_card(
        folder,
        config,
        name=name,
        hub_id=hub_id,
        data=card_data(config, depth_class=depth_class, base_model=hub_id, source_card=source_folder / CARD_NAME),
        how=f"trained with the code of {project} and converted by `depthattn import`",
        loading=how_to_load(name, depth_class),
    )


def write_export_card(
    folder: Path, config: DepthAttnConfig, *, name: str, hub_id: str | None, source_folder: Path, depth_class: str
) -> None:
    """Write the model card of a checkpoint that was exported to flash-linear-attention.

    Args:
        folder: the folder for README.md.
        config: config of the source.
        name: name of the checkpoint and of its folder.
        hub_id: Hub id of the source, if it is from the Hub.
        source_folder: folder of the source; its card contains licence and languages.
        depth_class: name of the source's class in this package.
    """
    data = card_data(config, depth_class=depth_class, base_model=hub_id, source_card=source_folder / CARD_NAME)
    # The folder has no code; the library is imported instead.
    data.tags = [tag for tag in data.tags or () if tag != "custom_code"]
    _write_converted_card(
        folder,
        config,
        name=name,
        hub_id=hub_id,
        data=data,
        how="converted by `depthattn export` for "
        "[flash-linear-attention](https://github.com/fla-org/flash-linear-attention)",
        loading=f"""\
```python
import fla  # registers the model type
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
""",
    )


def _write_converted_card(
    folder: Path,
    config: DepthAttnConfig,
    *,
    name: str,
    hub_id: str | None,
    data: ModelCardData,
    how: str,
    loading: str,
) -> None:
    card = ModelCard.from_template(
        data,
        template_str=_CONVERTED_TEMPLATE,
        title=name,
        source=link_to(hub_id) or "A checkpoint",
        how=how,
        additions=additions(config),
        table=table(config),
        loading=loading,
        papers=papers(config),
    )
    card.save(folder / CARD_NAME)
