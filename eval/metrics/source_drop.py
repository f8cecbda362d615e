"""`source_drop`: loss without some AttnRes sources, compared with random drops of the same number.

The weight of a source does not measure its effect (arXiv 2606.13168). Dropping it does: the softmax then runs over the
other sources.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attn_res_connection import AttnResSite
from ...attn_res_ops import attn_res_read_reference
from ...depth_state import Carried, DepthState
from .probing.interventions import own_layers
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches

#: Index of a site (0 .. 2L - 1, 2L is the output site) and of one of its sources (0 is the embedding).
Drop = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class SourceDrop(MetricResult):
    """Result of `source_drop`.

    Attributes:
        drops: (site, source) pairs.
        loss: loss of the unchanged model.
        increase: loss with dropped sources minus loss of the model, in nats.
        control_increases: [num_controls], the same for random drops of as many sources at each of these sites.
        control_mean: their mean; NaN without controls.
        control_std: their standard deviation; NaN with fewer than two.
        seed: seed of the random drops.
    """

    drops: tuple[Drop, ...]
    loss: float
    increase: float
    control_increases: Tensor
    control_mean: float
    control_std: float
    seed: int


@dataclass(frozen=True, eq=False, kw_only=True)
class SourceDropMatrix(MetricResult):
    """Result of `source_drop_matrix`.

    Attributes:
        increases: [sites, sources], loss with one source dropped at one site minus loss of the model, in nats; NaN
            where a site does not read the source, and for sites with a single source.
        controls: [sites, sources], mean increase over the other sources of the site, i.e. the exact expectation of a
            random control. NaN if there are none.
        loss: loss of the unchanged model.
    """

    increases: Tensor
    controls: Tensor
    loss: float


@depth_metric
def source_drop(
    probe: DepthProbe, text: TextBatches, *, drops: Collection[Drop], num_controls: int = 5, seed: int = 0
) -> SourceDrop:
    """Measure the loss when sites do not read some sources, compared with random drops (as in arXiv 2606.13168).

        h_l = read_scale * sum_{i not dropped} softmax_{i not dropped}(query_l . RMSNorm(v_i)) v_i

    With `read_scale="sum"` the factor is the number of remaining sources, so with zero queries they keep their weight
    in the residual sum.

    Args:
        probe: a model with AttnRes.
        text: the text.
        drops: (site, source) pairs; every site must keep at least one source.
        num_controls: number of random controls, each with as many dropped sources at each of these sites.
        seed: seed of the random drops.

    Raises:
        ValueError: for a model without AttnRes, a pair that does not exist, or a site that would read nothing.
    """
    drops = tuple(sorted(set(drops)))
    loss = probe.loss(text)
    with dropped_sources(probe, drops):
        increase = probe.loss(text) - loss
    controls = []
    for control in random_drops(probe, drops, num_controls, seed):
        with dropped_sources(probe, control):
            controls.append(probe.loss(text) - loss)
    increases = torch.tensor(controls, dtype=torch.float64)
    return SourceDrop(
        drops=drops,
        loss=loss,
        increase=increase,
        control_increases=increases,
        control_mean=increases.mean().item() if controls else float("nan"),
        control_std=increases.std().item() if len(controls) > 1 else float("nan"),
        seed=seed,
    )


@depth_metric
def source_drop_matrix(probe: DepthProbe, text: TextBatches) -> SourceDropMatrix:
    """Measure the loss without each source at each site, one at a time, to compare with the map of weights.

    Args:
        probe: a model with AttnRes.
        text: the text.
    """
    visible = visible_sources(probe)
    increases = torch.full((len(visible), max(map(max, visible)) + 1), torch.nan, dtype=torch.float64)
    controls = increases.clone()
    drops = [(site, source) for site, sources in enumerate(visible) if len(sources) > 1 for source in sources]
    # The output site counts as part of the last layer.
    first = [min(site // 2, probe.num_layers - 1) for site, _ in drops]
    changes = [(layer, partial(dropped_sources, probe, [drop])) for layer, drop in zip(first, drops, strict=True)]
    loss, changed = probe.losses(text, changes)
    for (site, source), dropped in zip(drops, changed, strict=True):
        increases[site, source] = dropped - loss
    for site, sources in enumerate(visible):
        if len(sources) < 2:
            continue
        row = increases[site, list(sources)]
        controls[site, list(sources)] = (row.sum() - row) / (len(sources) - 1)
    return SourceDropMatrix(increases=increases, controls=controls, loss=loss)


def old_sources(probe: DepthProbe, min_age: int = 2) -> tuple[Drop, ...]:
    """Return drops of all sources (also the embedding) that are at least `min_age` older than the site's newest."""
    pairs = ((site, source) for site, sources in enumerate(visible_sources(probe)) for source in sources)
    newest = [sources[-1] for sources in visible_sources(probe)]
    return tuple((site, source) for site, source in pairs if newest[site] - source >= min_age)


def visible_sources(probe: DepthProbe) -> list[tuple[int, ...]]:
    """Return the indices of the sources that each site reads, oldest first.

    The newest source is the open block, or the block just finished.

    Raises:
        ValueError: for a model without AttnRes.
    """
    config = probe.depth_config
    return [site.visible(tuple(range(config.num_sources(number)))) for number, site in enumerate(depth_sites(probe))]


def depth_sites(probe: DepthProbe) -> list[AttnResSite]:
    """Return the sites of a model with AttnRes: attention 0, MLP 0, ..., output site.

    Raises:
        ValueError: for a model without AttnRes.
    """
    if not probe.mixes_sources:
        raise ValueError(f"connection: a {probe.family!r} model has no depth weights; use a model with AttnRes")
    layers = own_layers(probe.layers)
    sites = [site for layer in layers for site in (layer.attn_depth, layer.mlp_depth)]
    return cast(list[AttnResSite], [*sites, layers[-1].out_depth])


def random_drops(probe: DepthProbe, drops: Collection[Drop], count: int, seed: int) -> list[tuple[Drop, ...]]:
    """Draw random drops with as many sources per site as `drops`, and different from `drops` where possible.

    Args:
        probe: a model with AttnRes.
        drops: (site, source) pairs.
        count: number of random drops.
        seed: random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    per_site: dict[int, list[int]] = defaultdict(list)
    for site, source in sorted(set(drops)):
        per_site[site].append(source)
    visible = visible_sources(probe)
    has_choice = any(0 < len(sources) < len(visible[site]) for site, sources in per_site.items())
    found: list[tuple[Drop, ...]] = []
    while len(found) < count:
        control: list[Drop] = []
        for site, sources in per_site.items():
            chosen = torch.randperm(len(visible[site]), generator=generator)[: len(sources)]
            control += [(site, visible[site][index]) for index in sorted(chosen.tolist())]
        if not has_choice or set(control) != set(drops):
            found.append(tuple(control))
    return found


@contextmanager
def dropped_sources(probe: DepthProbe, drops: Collection[Drop]) -> Iterator[None]:
    """Drop some sources from the reads of sites.

    Args:
        probe: a model with AttnRes.
        drops: (site, source) pairs.

    Raises:
        ValueError: for a model without AttnRes, a pair that does not exist, or a site that would read nothing.
    """
    sites, visible = depth_sites(probe), visible_sources(probe)
    per_site: dict[int, set[int]] = defaultdict(set)
    for site, source in drops:
        if not 0 <= site < len(sites) or source not in visible[site]:
            raise ValueError(
                f"drops: ({site}, {source}) does not exist; sites are 0 to {len(sites) - 1}, their sources"
            )
        per_site[site].add(source)
    with ExitStack() as stack:
        for number, gone in per_site.items():
            kept = tuple(position for position, source in enumerate(visible[number]) if source not in gone)
            if not kept:
                raise ValueError(f"drops: site {number} would have no source left; keep at least one")
            stack.enter_context(sites[number].register_forward_hook(_reads_some(kept), prepend=True))
        yield


def _reads_some(kept: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    def hook(site: AttnResSite, args: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        state, reads = args[:2]
        return partial_read(site, state, reads, kept), *output[1:]

    return hook


def partial_read(site: AttnResSite, state: DepthState, reads: Carried | None, kept: tuple[int, ...]) -> Tensor:
    """Return what an AttnRes site reads from a subset of its sources.

    Args:
        site: an `AttnResSite`.
        state: the depth state.
        reads: the weights of all reads; `None` with static scores.
        kept: positions of the kept sources among those of the site, ascending.
    """
    visible = site.visible((*state.sources, state.open_block))
    sources = [visible[position] for position in kept]
    if len(sources) == 1:
        return sources[0]
    read_scale = float(len(sources)) if site.sums_sources else 1.0
    if reads is None:
        return _static_read(site, sources, kept, read_scale)
    # An input-dependent query is computed from the newest source, even if it is dropped.
    inputs = site.inputs(visible, reads.value)
    return attn_res_read_reference(inputs._replace(sources=sources, read_scale=read_scale))[0]


def _static_read(site: AttnResSite, sources: list[Tensor], kept: tuple[int, ...], read_scale: float) -> Tensor:
    scores = cast(Tensor, site.mix_scores)[:, list(kept)]  # [H, N]
    weights = scores.softmax(-1) if site.activation == "softmax" else scores.sigmoid() * (2 / len(sources))
    heads = weights.shape[0]
    mixed = sum(weights[:, i, None] * source.unflatten(-1, (heads, -1)) for i, source in enumerate(sources))
    return cast(Tensor, (read_scale * mixed).flatten(-2).to(sources[0].dtype))


@contextmanager
def skip_sublayer(probe: DepthProbe, index: int) -> Iterator[None]:
    """Skip a sublayer; with AttnRes, reads exclude a source that would only contain its output.

    Args:
        probe: the model.
        index: index of the sublayer.
    """
    with ExitStack() as stack:
        stack.enter_context(probe.replace_sublayer(probe.sublayers[index], torch.zeros_like))
        if probe.mixes_sources:
            size = probe.depth_config.block_size_sublayers
            visible = visible_sources(probe)
            # Sites that read the block before another sublayer has written to it.
            holds_it: range = range(0)
            if index % size == 0:
                holds_it = range(index + 1, len(visible) if size == 1 else index + 2)
            source = index // size + 1
            stack.enter_context(
                dropped_sources(probe, [(site, source) for site in holds_it if source in visible[site]])
            )
        yield


def _source_drop_old(model: PreTrainedModel | DepthProbe, batches: TextBatches) -> SourceDrop:
    probe = DepthProbe.of(model)
    return source_drop(probe, batches, drops=old_sources(probe))


def _num_drops(probe: DepthProbe) -> float:
    sites = visible_sources(probe)
    return 1.0 + sum(len(sources) * (1 - site / len(sites)) for site, sources in enumerate(sites) if len(sources) > 1)


METRICS = {
    "source_drop_old": DepthMetric(
        _source_drop_old,
        lambda probe: 7.0,
        True,
        lambda probe: probe.mixes_sources and bool(old_sources(probe)),
    ),
    "source_drop_matrix": DepthMetric(source_drop_matrix, _num_drops, False, lambda probe: probe.mixes_sources),
}
