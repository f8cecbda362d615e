"""The section with the slider: what one layer reads, whom it affects, and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .charts import Rows, bars, heat_map
from .panels import Panel, Parts, found, names_of, titled
from .panels_depth import source_names

# More cells than this make the page heavy: slots are then shown as means over heads.
_MOST_HEAD_CELLS = 6000


def layer_panels(parts: Parts) -> list[Panel]:
    """Charts that show one layer, that of the parameter `layer`."""
    return [*_weights(parts), *_slots(parts), *_effects(parts)]


def layer_numbers(parts: Parts) -> list[dict[str, Any]]:
    """Lines of the table: a title, and by model one number per layer."""
    lines = []
    for title, metric, value_of in _NUMBERS:
        values = [
            value_of(part["metrics"][metric]) if metric in part["metrics"] else [None] * part["info"]["num_layers"]
            for part in parts
        ]
        if any(value is not None for column in values for value in column):
            lines.append({"title": title, "values": [[_short(value) for value in column] for column in values]})
    return lines


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _field(name: str) -> Callable[[dict[str, Any]], list[float | None]]:
    return lambda result: result[name]


def _every_other(name: str, first: int) -> Callable[[dict[str, Any]], list[float | None]]:
    return lambda result: result[name][first : len(result[name]) // 2 * 2 : 2]


_NUMBERS: tuple[tuple[str, str, Callable[[dict[str, Any]], list[float | None]]], ...] = (
    ("loss increase without the layer (nats)", "causal_scores", _field("loss_increase")),
    ("mean change of later layers", "causal_scores", _field("per_skipped")),
    ("loss with an affine map / loss", "usefulness_layer", _field("ratios")),
    ("logit lens: loss read before the layer (nats)", "logit_lens", lambda result: result["cross_entropy"][:-1]),
    ("logit lens: share of the final top five", "logit_lens", lambda result: result["top5_overlap"][:-1]),
    ("‖update‖ / ‖state‖", "relative_contribution", _field("layers")),
    ("cos(update, state)", "relative_contribution", _field("layer_cosines")),
    ("angle to the next state / π", "angular_distance", _field("adjacent")),
    ("gradient norm of its parameters", "gradient_magnitude", _field("layer_parameters")),
    ("entropy of the read before attention", "depth_weights", _every_other("entropies", 0)),
    ("entropy of the read before the MLP", "depth_weights", _every_other("entropies", 1)),
    ("Jacobian gap", "jacobian_gap", _field("jacobian_identity_gap")),
)


def _weights(parts: Parts) -> list[Panel]:
    panels = []
    for name, result in found(parts, "depth_weights"):
        columns = source_names(len(result["means"][0]))
        rows: Rows = []
        # The output site belongs to no layer.
        for index, means in enumerate(result["means"][:-1]):
            known = sum(mean is not None for mean in means)
            kind = "before attention" if index % 2 == 0 else "before the MLP"
            rows += [
                {"layer": index // 2, "column": column, "kind": kind, "value": mean * known}
                for column, mean in zip(columns, means, strict=True)
                if mean is not None
            ]
        if not rows:
            continue
        chart = bars(
            rows,
            x="source (embedding, blocks)",
            y="weight × sources (1 = uniform)",
            columns=columns,
            rule=(1.0, "uniform"),
            limit=max(row["value"] for row in rows),
            by_layer=True,
        )
        panels.append(Panel(titled(parts, name, "What its reads look at (AttnRes)"), chart))
    return panels


def _slots(parts: Parts) -> list[Panel]:
    panels = []
    for name, result in found(parts, "slot_mass"):
        by_slot = result["by_slot"]
        num_heads = len(by_slot[0])
        by_head = len(by_slot) * num_heads * len(result["slots"]) <= _MOST_HEAD_CELLS
        rows = []
        for layer, heads in enumerate(by_slot):
            for slot, column in enumerate(result["slots"]):
                masses = [head[slot] for head in heads]
                if None in masses:
                    continue
                lines = enumerate(masses) if by_head else [("mean", sum(masses) / num_heads)]
                rows += [{"layer": layer, "column": column, "line": str(h), "value": mass} for h, mass in lines]
        if not rows:
            continue
        end = max(abs(row["value"]) for row in rows) or 1.0
        signed = any(row["value"] < 0 for row in rows)
        chart = heat_map(
            rows,
            x="slot",
            y="head",
            value="mass",
            columns=result["slots"],
            lines=list(dict.fromkeys(row["line"] for row in rows)),
            domain=(-end, end) if signed else (0.0, end),
            middle=0.0 if signed else None,
            by_layer=True,
        )
        panels.append(Panel(titled(parts, name, "What its heads read from depth slots (MoDA)"), chart))
    return panels


def _effects(parts: Parts) -> list[Panel]:
    rows, columns = [], []
    for name, result in found(parts, "causal_scores"):
        for layer, scores in enumerate(result["scores"]):
            rows += [
                {"layer": layer, "column": str(later), "value": score, "kind": name}
                for later, score in enumerate(scores)
                if score is not None
            ]
        columns = max(columns, [str(later) for later in range(1, len(result["scores"]))], key=len)
    if not rows:
        return []
    top = max(row["value"] for row in rows)
    chart = bars(
        rows,
        x="later layer",
        y="relative change C(s, l)",
        columns=columns,
        limit=top,
        kinds=names_of(parts),
        by_layer=True,
    )
    return [Panel("Whose updates change when it is skipped", chart)]
