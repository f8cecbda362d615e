"""Table of how the trained models use their depth, and sentences that compare it with the papers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .arms import ARMS, REFERENCE, SCALED
from .cells import Lines, table_lines
from .group import Group
from .runs import Run

#: Run -> metrics of its trained model, as `dynamics.measure` returns them.
Dynamics = Mapping[Run, Mapping[str, Any]]

_COLUMNS = (
    *("arm", "state magnitude, late / early", "output magnitude, late / early", "gradient, early / late"),
    *("usefulness, %", "causal score"),
    *("entropy of weights", "weight of the embedding", "weight of the newest source", "mass of slots (uniform)"),
)


def growth(values: Sequence[float]) -> float:
    """Return the mean of the last quarter divided by that of the first quarter.

    Args:
        values: one value per layer or sublayer.
    """
    quarter = max(1, len(values) // 4)
    return statistics.fmean(values[-quarter:]) / statistics.fmean(values[:quarter])


def dynamics_table(group: Group, dynamics: Dynamics) -> Lines:
    """Return the table, or nothing if no model was measured.

    Args:
        group: the results.
        dynamics: metrics of trained models.
    """
    models = {name: _of_arm(group, dynamics, name) for name in group.arms(is_continued=False)}
    rows = [[ARMS[name].label, *_cells(found)] for name, found in models.items() if found]
    return table_lines(_COLUMNS, rows) if rows else []


def dynamics_sentences(group: Group, dynamics: Dynamics) -> Lines:
    """Say in which arms states and gradients are spread more evenly over depth than in PreNorm.

    Arms that bound the stream of an untrained model are compared with scaled PreNorm, others with PreNorm.

    Args:
        group: the results.
        dynamics: metrics of trained models.
    """
    models = {name: _of_arm(group, dynamics, name) for name in group.arms(is_continued=False)}
    models = {name: found for name, found in models.items() if found}
    said = []
    for words, field, sign in (
        ("Magnitude of the state after late layers, relative to early ones", "state_magnitudes", 1),
        ("Gradients of early layers, relative to late ones", "layer_gradients", -1),
    ):
        ratios = {name: _mean_growth(found, field) ** sign for name, found in models.items()}
        for baseline in (SCALED, REFERENCE):
            compared = [
                name
                for name in ratios
                if name not in (SCALED, REFERENCE) and ARMS[name].is_like_scaled == (baseline == SCALED)
            ]
            if baseline in ratios and compared:
                said.append(f"- {words}: {_compared(ratios, baseline, compared)}.")
    return said


def _compared(ratios: Mapping[str, float], baseline: str, names: Sequence[str]) -> str:
    """Say which ratios are closer to 1 than that of the baseline."""
    unevenness = {name: abs(math.log(ratio)) for name, ratio in ratios.items()}
    parts = [f"{ratios[baseline]:.2f} in {ARMS[baseline].label}"]
    for comparison, wanted in (("closer to 1 in", True), ("no closer in", False)):
        found = [name for name in names if (unevenness[name] < unevenness[baseline]) == wanted]
        if found:
            labels = (f"{ARMS[name].label} ({ratios[name]:.2f})" for name in sorted(found, key=unevenness.__getitem__))
            parts.append(f"{comparison} {', '.join(labels)}")
    return "; ".join(parts)


def _of_arm(group: Group, dynamics: Dynamics, name: str) -> list[Mapping[str, Any]]:
    return [dynamics[run] for run in group.plan.seeds(name) if run in dynamics]


def _mean_growth(models: Sequence[Mapping[str, Any]], field: str) -> float:
    # The first state is the embedding.
    first = 1 if field == "state_magnitudes" else 0
    return statistics.fmean(growth(model[field][first:]) for model in models)


def _cells(models: Sequence[Mapping[str, Any]]) -> Lines:
    cells = [
        f"{_mean_growth(models, 'state_magnitudes'):.2f}",
        f"{_mean_growth(models, 'sublayer_magnitudes'):.2f}",
        f"{1 / _mean_growth(models, 'layer_gradients'):.2f}",
        f"{100 * (statistics.fmean(model['usefulness'] for model in models) - 1):.1f}",
        f"{statistics.fmean(model['causal_score'] for model in models):.2f}",
    ]
    for field in ("entropy", "embedding", "newest"):
        cells.append(_mean_of(models, "depth_weights", field))
    mass, uniform = (_mean_of(models, "slot_mass", field) for field in ("total", "uniform"))
    return [*cells, "-" if mass == "-" else f"{mass} ({uniform})"]


def _mean_of(models: Sequence[Mapping[str, Any]], part: str, field: str) -> str:
    known = [model[part][field] for model in models if part in model]
    return f"{statistics.fmean(known):.2f}" if known else "-"
