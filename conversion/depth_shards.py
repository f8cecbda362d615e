"""The depth parameters of a fresh checkpoint as shards: what is in them, and their initial values site by site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init

from hf_depthattn.configuration_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import DEPTH_MODULES, depth_site

#: The size at which transformers starts a new shard.
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class DepthSiteTensors:
    """The tensors of one site: its number, and name -> (dtype, shape, bytes) in the order of its module."""

    site: int
    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    num_parameters: int


def plan_depth_shards(config: DepthAttnConfig, key_prefix: str) -> list[list[DepthSiteTensors]]:
    """Which depth tensors there are, in shards of at most `MAX_SHARD_BYTES`; a site is never split.

    Args:
        config: the checkpoint's config.
        key_prefix: what stands before `layers.N.` in its keys.
    """
    shards: list[list[DepthSiteTensors]] = []
    shard_bytes = 0
    for name, site in _site_names(config, key_prefix):
        with torch.device("meta"):
            parameters = depth_site(config, site).state_dict()
        tensors = {f"{name}.{leaf}": ("F32", tuple(value.shape), value.nbytes) for leaf, value in parameters.items()}
        assert all(value.dtype == torch.float32 for value in parameters.values()), f"{name}: not float32"
        if not tensors:
            continue
        site_bytes = sum(value.nbytes for value in parameters.values())
        if not shards or shard_bytes + site_bytes > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shard_bytes += site_bytes
        num_parameters = sum(value.numel() for value in parameters.values())
        shards[-1].append(DepthSiteTensors(site, tensors, num_parameters))
    return shards


def _site_names(config: DepthAttnConfig, key_prefix: str) -> Iterator[tuple[str, int]]:
    attention, mlp, output = DEPTH_MODULES
    num_layers = config.text_config.num_hidden_layers
    for layer in range(num_layers):
        yield f"{key_prefix}layers.{layer}.{attention}", 2 * layer
        yield f"{key_prefix}layers.{layer}.{mlp}", 2 * layer + 1
    yield f"{key_prefix}layers.{num_layers - 1}.{output}", 2 * num_layers


def depth_values(config: DepthAttnConfig, sites: list[DepthSiteTensors]) -> Iterator[memoryview]:
    """The initial values of the sites of one shard, one site at a time, so that memory holds no more than one.

    Args:
        config: the checkpoint's config.
        sites: a shard of `plan_depth_shards`.
    """
    for planned in sites:
        site: nn.Module = depth_site(config, planned.site)
        with torch.no_grad():
            site.init_parameters(init)
        for value in site.state_dict().values():
            yield memoryview(value.contiguous().numpy()).cast("B")
