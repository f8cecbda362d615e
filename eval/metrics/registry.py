"""The depth metrics by name, what each costs, and which are cheap: the list that a report works through."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .causal import causal_scores
from .gradients import gradient_magnitude
from .interventions import visible_slots
from .jacobian import jacobian_gap
from .logit_lens import logit_lens
from .permutation import permutation_scores
from .probe import DepthProbe
from .results import MetricResult
from .routing import depth_weights, slot_mass
from .slot_drop import slot_drop
from .source_drop import old_sources, source_drop, source_drop_matrix, visible_sources
from .states import (
    angular_distance,
    block_influence,
    output_magnitude,
    output_variance,
    relative_contribution,
)
from .text import TextBatches
from .usefulness import usefulness


@dataclass(frozen=True)
class DepthMetric:
    """One line of the registry.

    Attributes:
        run: `run(model or probe, batches, **options)`, the metric itself, with what the line's name says filled in.
        num_forwards: for a probe, estimated passes over the whole text; a backward pass counts as two.
        is_cheap: whether it is part of the default report.
        applies: whether a model has what it measures.
    """

    run: Callable[..., MetricResult]
    num_forwards: Callable[[DepthProbe], float]
    is_cheap: bool
    applies: Callable[[DepthProbe], bool]


def _always(probe: DepthProbe) -> bool:
    return True


def _knows_sublayers(probe: DepthProbe) -> bool:
    return probe.knows_sublayers


def _is_residual(probe: DepthProbe) -> bool:
    return not probe.mixes_sources


def _mixes_sources(probe: DepthProbe) -> bool:
    return probe.mixes_sources


def _has_slots(probe: DepthProbe) -> bool:
    return probe.has_slots


def _has_old_sources(probe: DepthProbe) -> bool:
    return probe.mixes_sources and bool(old_sources(probe))


def _constant(passes: float) -> Callable[[DepthProbe], float]:
    return lambda probe: passes


def _with(metric: Callable[..., MetricResult], **options) -> Callable[..., MetricResult]:
    return lambda model, batches, **more: metric(model, batches, **options, **more)


def _old_source_drop(model, batches, **more) -> MetricResult:
    probe = DepthProbe.of(model)
    return source_drop(probe, batches, drops=old_sources(probe), **more)


def _num_drops(probe: DepthProbe) -> float:
    sites = visible_sources(probe)
    return 1.0 + sum(len(sources) * (1 - site / len(sites)) for site, sources in enumerate(sites) if len(sources) > 1)


def _num_slot_drops(probe: DepthProbe) -> float:
    visible = visible_slots(probe.model.config, probe.layers)
    return 1.0 + (len({slot for slots in visible for slot in slots}) + sum(map(bool, visible))) / 2


def _readout(probe: DepthProbe) -> float:
    """Passes that the head and three softmaxes over the vocabulary take, by the share of the head's parameters."""
    head = probe.model.get_output_embeddings()
    total = sum(p.numel() for p in probe.model.parameters())
    return 0.4 if head is None else min(1.0, 3.0 * sum(p.numel() for p in head.parameters()) / total)


#: Name -> metric, cheap and informative ones first. Half the text is fitted and half scored in `usefulness_*`.
DEPTH_METRICS: dict[str, DepthMetric] = {
    "depth_weights": DepthMetric(depth_weights, _constant(1.2), True, _mixes_sources),
    "slot_mass": DepthMetric(slot_mass, _constant(1.2), True, _has_slots),
    "output_magnitude": DepthMetric(output_magnitude, _constant(1.2), True, _always),
    "output_variance": DepthMetric(output_variance, _constant(1.2), True, _always),
    "relative_contribution": DepthMetric(relative_contribution, _constant(1.5), True, _always),
    "block_influence": DepthMetric(block_influence, _constant(1.2), True, _always),
    "angular_distance": DepthMetric(angular_distance, _constant(2.0), True, _always),
    "logit_lens": DepthMetric(logit_lens, lambda probe: 1 + (probe.num_layers + 1) * _readout(probe), True, _always),
    "gradient_magnitude": DepthMetric(gradient_magnitude, _constant(3.0), True, _always),
    "causal_scores": DepthMetric(causal_scores, lambda probe: 1.2 + 0.6 * probe.num_layers, True, _always),
    "usefulness_layer": DepthMetric(
        _with(usefulness, level="layer"), lambda probe: 2 + 0.25 * probe.num_layers, True, _is_residual
    ),
    "usefulness_sublayer": DepthMetric(
        _with(usefulness, level="sublayer"), lambda probe: 3 + 0.5 * probe.num_layers, True, _knows_sublayers
    ),
    "permutation_adjacent": DepthMetric(permutation_scores, lambda probe: 1 + 0.5 * probe.num_layers, True, _always),
    "source_drop_old": DepthMetric(_old_source_drop, _constant(7.0), True, _has_old_sources),
    "jacobian_gap": DepthMetric(jacobian_gap, _constant(18.0), False, _always),
    "slot_drop": DepthMetric(slot_drop, _num_slot_drops, False, _has_slots),
    "source_drop_matrix": DepthMetric(source_drop_matrix, _num_drops, False, _mixes_sources),
    "causal_scores_sublayer": DepthMetric(
        _with(causal_scores, level="sublayer"), lambda probe: 1.2 + 1.2 * probe.num_layers, False, _knows_sublayers
    ),
    "permutation_all": DepthMetric(
        _with(permutation_scores, pairs="all"),
        # The earlier layer of a pair lies at a third on average.
        lambda probe: 1 + probe.num_layers * (probe.num_layers - 1) / 3,
        False,
        _always,
    ),
}


def depth_metrics_of(model, *, full: bool = False) -> dict[str, DepthMetric]:
    """The metrics that a model has, in the order to run them.

    Args:
        model: the model, or its probe.
        full: the expensive ones too.

    Returns:
        A part of `DEPTH_METRICS`.
    """
    probe = DepthProbe.of(model)
    return {
        name: metric for name, metric in DEPTH_METRICS.items() if (full or metric.is_cheap) and metric.applies(probe)
    }


def estimate_seconds(model, text: TextBatches, *, full: bool = False) -> dict[str, float]:
    """Seconds that each metric of a model will take on a text, from the time of one batch.

    Args:
        model: the model, or its probe.
        text: the text.
        full: the expensive metrics too.
    """
    probe = DepthProbe.of(model)
    batch = next(iter(text))
    with probe.evaluation(), torch.no_grad():
        # The first pass fills caches and compiles kernels.
        for _ in range(2):
            start = time.perf_counter()
            probe.loss(TextBatches(batch, len(batch)))
            seconds = time.perf_counter() - start
    seconds *= text.num_sequences / len(batch)
    return {name: metric.num_forwards(probe) * seconds for name, metric in depth_metrics_of(probe, full=full).items()}
