"""The model card (README.md) of a retrofitted checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

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
