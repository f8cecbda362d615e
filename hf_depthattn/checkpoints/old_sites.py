"""The old layout of checkpoints and adapters, in which every site has a query and a key-norm weight of its own.

Now they are rows of the module `DepthReads`: row i has the values of site i.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from ..attn_res_reads import DEPTH_READS
from ..checkpoint_keys import stacked_name
from ..depth_connections import DEPTH_MODULES

#: Names in a site by the names in `DepthReads`.
IN_OLD_SITE = {"query": "query", "key_norm": "key_norm.weight"}


def site_name(site: int, num_layers: int) -> str:
    """Return the name of a site in the base model, such as `layers.3.mlp_depth`.

    Args:
        site: its number.
        num_layers: number of decoder layers; the output site is in the last one.
    """
    layer = min(site // 2, num_layers - 1)
    return f"layers.{layer}.{DEPTH_MODULES[site - 2 * layer]}"


def stack_old_sites(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the present layout.

    Args:
        tensors: tensors by name, in the old layout.
    """
    stacked: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    # Sorted by the numbers in the names, so that rows are in the order of the sites.
    for name in sorted(tensors, key=dot_natural_key):
        target = stacked_name(name)
        if target is None:
            stacked[name] = tensors[name]
        else:
            rows.setdefault(target, []).append(tensors[name])
    return stacked | {name: torch.stack(values) for name, values in rows.items()}


def in_old_layout(shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of depth tensors as they are in the old layout.

    Args:
        shapes: shapes by name, in the present layout.
        num_layers: number of decoder layers.
    """
    old: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, is_read, parameter = name.rpartition(f"{DEPTH_READS}.")
        if is_read:
            sites = (site_name(site, num_layers) for site in range(shape[0]))
            old |= {f"{prefix}{site}.{IN_OLD_SITE[parameter]}": shape[1:] for site in sites}
        else:
            old[name] = shape
    return old
