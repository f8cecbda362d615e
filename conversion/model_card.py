"""The model card (README.md) of a retrofitted checkpoint."""

from __future__ import annotations

from pathlib import Path

from ..configuration_depthattn import DepthAttnConfig
from ..model_card import CARD_NAME, additions, card_metadata, how_to_load, link_to, schemes_of, table

_TEMPLATE = """\
---
{metadata}---

# {title}

{source} with {additions}.
The weights are those of the source. The {num_depth_parameters:,} depth parameters are new and not trained: the model
computes the same function as its source.

{table}

{loading}
`depthattn verify SOURCE {name}` compares it with its source. `depthattn restore {name} HOST_DIR` restores the source
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
    num_depth_parameters: int,
) -> None:
    """Write the model card of a retrofitted checkpoint.

    Args:
        folder: the folder for README.md.
        config: the checkpoint's config.
        name: name of the checkpoint and of its folder.
        hub_id: Hub id of the source, if it is from the Hub.
        source_folder: folder of the source; its card contains licence and languages.
        depth_class: name of the model's class in this package.
        num_depth_parameters: number of new parameters.
    """
    schemes = schemes_of(config)
    conditions = [scheme.condition for scheme in schemes if scheme.condition]
    text = _TEMPLATE.format(
        metadata=card_metadata(
            config, depth_class=depth_class, base_model=hub_id, source_card=source_folder / CARD_NAME
        ),
        title=name,
        source=link_to(hub_id) or "A stock checkpoint",
        additions=additions(config),
        num_depth_parameters=num_depth_parameters,
        table=table(config),
        loading=how_to_load(name, depth_class),
        name=name,
        condition=f"as long as {' and '.join(conditions)}" if conditions else "at any time",
        papers="".join(f"\n{scheme.paper}\n" for scheme in schemes),
    )
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
