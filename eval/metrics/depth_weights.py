"""Depth weights: the softmax weights of AttnRes sites over their sources.

A weight does not measure importance (arXiv 2606.13168): compare with `source_drop`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches
from .source_drop import depth_sites, visible_sources
from .weights import site_names


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthWeights(MetricResult):
    """Result of `depth_weights` for S = 2L + 1 sites and at most N sources; NaN where a site does not read a source.

    Attributes:
        sites: S names of sites.
        means: [S, N], mean weight over tokens and depth heads; column 0 is the embedding.
        variances: [S, N], variance over tokens, averaged over depth heads; 0 if the weights do not depend on the
            token.
        entropies: [S], mean over tokens of entropy / log(number of sources); 1 is uniform, NaN for a single source.
        argmax: for each site, the source with the largest mean weight.
        query_norms: [S], L2 norm of query times key-norm weight; 0 means uniform weights, NaN with static scores.
    """

    sites: tuple[str, ...]
    means: Tensor
    variances: Tensor
    entropies: Tensor
    argmax: tuple[int, ...]
    query_norms: Tensor


@depth_metric
def depth_weights(probe: DepthProbe, text: TextBatches) -> DepthWeights:
    """Measure the weights of every AttnRes site (AttnRes, arXiv 2603.15031, Fig. 8).

        alpha_{l,i} = softmax_i(query_l . RMSNorm(v_i));   E_t alpha, Var_t alpha, E_t H(alpha) / log n

    Weights are taken before `read_scale`. Sigmoid weights are normalised for the entropy.

    Args:
        probe: a model with AttnRes.
        text: the text.

    Raises:
        ValueError: for a model without AttnRes.
    """
    sites, visible = depth_sites(probe), visible_sources(probe)
    sums: list[list[Tensor]] = []
    for ids in text:
        weights_of_sites = probe.run(ids, output_depth_attentions=True).depth_attentions
        found = [_moments(weights.double()) for weights in weights_of_sites]
        sums = (
            [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(sums, found, strict=True)] if sums else found
        )
    means = torch.full((len(sites), max(map(max, visible)) + 1), torch.nan, dtype=torch.float64)
    variances, entropies = means.clone(), torch.full((len(sites),), torch.nan, dtype=torch.float64)
    for site, (total, squares, entropy) in enumerate(sums):
        mean = total / text.num_tokens  # [H, n]
        columns = list(visible[site])
        means[site, columns] = mean.mean(dim=0)
        variances[site, columns] = (squares / text.num_tokens - mean.square()).clamp_min(0).mean(dim=0)
        if len(columns) > 1:
            entropies[site] = entropy / (text.num_tokens * math.log(len(columns)))
    return DepthWeights(
        sites=tuple(site_names(probe.num_layers)),
        means=means,
        variances=variances,
        entropies=entropies,
        argmax=tuple(means.nan_to_num(-math.inf).argmax(dim=-1).tolist()),
        query_norms=_query_norms(probe),
    )


def _moments(weights: Tensor) -> list[Tensor]:
    """Sum weights [B, T, H, n] over tokens: weights [H, n], squares [H, n], mean entropy of the heads []."""
    shares = weights / weights.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1).mean(dim=-1).sum()
    return [weights.sum(dim=(0, 1)).cpu(), weights.square().sum(dim=(0, 1)).cpu(), entropy.cpu()]


def _query_norms(probe: DepthProbe) -> Tensor:
    if probe.depth_reads is None:
        return torch.full((2 * probe.num_layers + 1,), torch.nan, dtype=torch.float64)
    query, key_norm = probe.depth_reads.query, probe.depth_reads.key_norm
    weights = query if key_norm is None else query * key_norm
    norms: Tensor = weights.double().norm(dim=-1).cpu()
    return norms


METRICS = {"depth_weights": DepthMetric(depth_weights, lambda probe: 1.2, True, lambda probe: probe.mixes_sources)}
