"""The schedule of AttnRes reads: which of them share one pass over the finished sources.

The reads of a *group* of successive sites have all sources in common that are finished when the group opens. The first
read of the group computes the attention to them for all its reads (`attn_res_phase1_ops`), and every later read adds
the sources that the group has produced since (`attn_res_phase2_ops`; arXiv 2603.15031, section 3.2, Algorithm 1).
A source is then loaded once per group instead of once per read. The alternative, a *single* read of all sources at
every site (`attn_res_ops`), supports all options and can return its weights.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_depthattn import DepthAttnConfig
from .depth_options import AttnResSchedule, DepthActivation, QueryType

# Blocks of fewer sublayers share groups: the pass over the finished sources has a cost of its own.
_MIN_BLOCK_OF_GROUP = 4
# The kernels of phase 1 load the sources again for every 16 reads.
_MAX_READS_WITH_OUTPUT = 16


class ReadGroup(NamedTuple):
    """An open group of reads, in a `Carried`.

    Attributes:
        first_site: the site that opened it.
        num_covered: number of sources, the oldest ones, to which phase 1 has attended; 0 without phase 1.
        score_weights: score weights of its reads, each `[D]`.
        outs: outputs of phase 1, one per read, each `[B, T, D]`; empty without phase 1.
        lses: their log-sum-exps, each `[B * T]`; empty without phase 1.
    """

    first_site: int
    num_covered: int
    score_weights: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    lses: tuple[Tensor, ...]


def supports_groups(config: DepthAttnConfig) -> bool:
    """Return whether reads with these options can share work: those of the paper (arXiv 2603.15031, Eq. 2-6).

    Args:
        config: a config with AttnRes.
    """
    return (
        config.key_norm
        and not config.static_mix
        and config.query == QueryType.STATIC
        and config.depth_activation == DepthActivation.SOFTMAX
        and config.num_depth_heads == 1
        and config.depth_window is None
    )


def last_site_of_group(config: DepthAttnConfig, site: int) -> int:
    """Return the last site of the group of a site.

    A group is a block of Block AttnRes. Full AttnRes and small blocks have groups of about sqrt(2 L) sublayers, which
    balances the sources read in phase 1 and phase 2. The output site belongs to the last group, unless that has 16
    reads without it.

    Args:
        config: a config with AttnRes.
        site: number of the site.
    """
    size = config.block_size_sublayers
    if size < _MIN_BLOCK_OF_GROUP:
        # Even, so that a group does not end within a layer.
        pair = math.lcm(size, 2)
        size = pair * math.ceil(math.sqrt(config.num_sublayers) / pair)
    first, output_site = site // size * size, config.num_sublayers
    if first + size < output_site:
        return first + size - 1
    joins_last_group = output_site - first < _MAX_READS_WITH_OUTPUT
    return output_site if joins_last_group or site == output_site else output_site - 1


def uses_groups(schedule: str, newest: Tensor) -> bool:
    """Return whether a read that can share work does so.

    Args:
        schedule: the `AttnResSchedule` of the config.
        newest: the newest source, `[B, T, D]`.
    """
    if schedule != AttnResSchedule.AUTO:
        return schedule != AttnResSchedule.SINGLE
    # Decoding on a GPU takes the time of the launches, and a single read is one.
    is_decoding = newest.shape[1] == 1 and not torch.is_grad_enabled()
    return newest.device.type == "cpu" or not is_decoding
