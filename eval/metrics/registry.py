"""Registry of depth metrics, in the order in which a report measures them, and of the figures that show them."""

from __future__ import annotations

import time
from importlib import import_module
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .probing.probe import DepthProbe
from .probing.results import DepthMetric
from .probing.text import TextBatches


class Row(NamedTuple):
    """One row of the registry.

    Attributes:
        metric: name of the metric in `METRICS` of its module.
        module: name of its module in this folder.
        figures: names of modules in `report/figures/` that show it; empty if the figure of another metric shows it.
    """

    metric: str
    module: str
    figures: tuple[str, ...] = ()


#: Cheap metrics come first.
ROWS = (
    Row("depth_weights", "depth_weights", ("depth_weights", "depth_weight_sites")),
    Row("depth_mixing", "depth_mixing", ("depth_mixing",)),
    Row("slot_mass", "slot_mass", ("slot_mass",)),
    Row("output_magnitude", "output_magnitude", ("magnitude",)),
    Row("output_variance", "output_variance"),
    Row("relative_contribution", "relative_contribution", ("contribution",)),
    Row("block_influence", "block_influence"),
    Row("angular_distance", "angular_distance", ("similarity",)),
    Row("logit_lens", "logit_lens", ("logit_lens",)),
    Row("gradient_magnitude", "gradients", ("gradient",)),
    Row("causal_scores", "causal", ("causal",)),
    Row("usefulness_layer", "usefulness", ("usefulness",)),
    Row("usefulness_sublayer", "usefulness"),
    Row("permutation_adjacent", "permutation", ("permutation",)),
    Row("source_drop_old", "source_drop", ("source_drop",)),
    Row("jacobian_gap", "jacobian", ("jacobian",)),
    Row("slot_drop", "slot_drop", ("slot_drop",)),
    Row("source_drop_matrix", "source_drop", ("source_drop_matrix",)),
    Row("causal_scores_sublayer", "causal"),
    Row("permutation_all", "permutation"),
)


def _load(row: Row) -> DepthMetric:
    metrics: dict[str, DepthMetric] = import_module(f".{row.module}", __package__).METRICS
    return metrics[row.metric]


#: Metrics by name, in the order of the rows.
DEPTH_METRICS: dict[str, DepthMetric] = {row.metric: _load(row) for row in ROWS}


def depth_metrics_of(model: PreTrainedModel | DepthProbe, *, full: bool = False) -> dict[str, DepthMetric]:
    """Return the metrics that apply to a model, in the order in which to run them.

    Args:
        model: the model, or its probe.
        full: include expensive metrics.

    Returns:
        Entries of `DEPTH_METRICS`.
    """
    probe = DepthProbe.of(model)
    return {
        name: metric for name, metric in DEPTH_METRICS.items() if (full or metric.is_cheap) and metric.applies(probe)
    }


def estimate_seconds(
    model: PreTrainedModel | DepthProbe, text: TextBatches, *, full: bool = False
) -> dict[str, float]:
    """Estimate the run time of each metric of a model in seconds, from the time of one batch.

    Args:
        model: the model, or its probe.
        text: the text.
        full: include expensive metrics.
    """
    probe = DepthProbe.of(model)
    batch = next(iter(text))
    with probe.evaluation(), torch.no_grad():
        # The first pass is a warm-up.
        for _ in range(2):
            start = time.perf_counter()
            probe.loss(TextBatches(batch, len(batch)))
            seconds = time.perf_counter() - start
    seconds *= text.num_sequences / len(batch)
    return {name: metric.num_forwards(probe) * seconds for name, metric in depth_metrics_of(probe, full=full).items()}
