"""Table of how the trained models use their depth, and sentences that compare it with the papers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .arms import ARMS
from .cells import Lines, table_lines
from .group import Group
from .runs import Run

#: Run -> metrics of its trained model, as `dynamics.measure` returns them.
Dynamics = Mapping[Run, Mapping[str, Any]]

_COLUMNS = (
    *("arm", "state magnitude, late / early", "output magnitude, late / early", "gradient, early / late"),
    *("usefulness", "causal score"),
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
    """Say in which arms outputs and gradients are spread more evenly over depth than in the reference.

    Args:
        group: the results.
        dynamics: metrics of trained models.
    """
    models = {name: _of_arm(group, dynamics, name) for name in group.arms(is_continued=False)}
    if not models.get(group.reference):
        return []
    said = []
    for words, field, sign in (
        ("Magnitude of the state after late layers, relative to early ones", "state_magnitudes", 1),
        ("Gradients of early layers, relative to late ones", "layer_gradients", -1),
    ):
        ratios = {name: _mean_growth(found, field) ** sign for name, found in models.items() if found}
        of_reference = ratios.pop(group.reference)
        # Equal ones come first: the most even spread.
        by_evenness = sorted(ratios, key=lambda name: abs(math.log(ratios[name])))
        is_more_even = {name: abs(math.log(ratios[name])) < abs(math.log(of_reference)) for name in by_evenness}
        parts = [f"{words}: {of_reference:.2f} in {ARMS[group.reference].label}"]
        for comparison, wanted in (("closer to 1 in", True), ("farther from it in", False)):
            names = [
                f"{ARMS[name].label} ({ratios[name]:.2f})" for name in by_evenness if is_more_even[name] == wanted
            ]
            if names:
                parts.append(f"{comparison} {', '.join(names)}")
        said.append(f"- {'; '.join(parts)}.")
    return said


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
        *(_mean(model.get(field) for model in models) for field in ("usefulness", "causal_score")),
    ]
    for field in ("entropy", "embedding", "newest"):
        cells.append(_mean_of(models, "depth_weights", field))
    mass, uniform = (_mean_of(models, "slot_mass", field) for field in ("total", "uniform"))
    return [*cells, "-" if mass == "-" else f"{mass} ({uniform})"]


def _mean_of(models: Sequence[Mapping[str, Any]], part: str, field: str) -> str:
    return _mean(model[part][field] for model in models if part in model)


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else "-"
