"""Panels of the metrics that every model has: curves over the layers, and matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from .charts import Rows, bars, curve, heat_map

#: The measured models of a report, as in report.json.
Parts = list[dict[str, Any]]

_KINDS = {"attn": "attention", "mlp": "MLP", "mixer": "mixer"}


@dataclass(frozen=True)
class Panel:
    """One chart with its title."""

    title: str
    chart: alt.Chart | alt.LayerChart


def found(parts: Parts, metric: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and result of every model for which a metric was measured."""
    for part in parts:
        if metric in part["metrics"]:
            yield part["name"], part["metrics"][metric]


def titled(parts: Parts, name: str, title: str) -> str:
    """A panel of one model says of which, where there are two."""
    return f"{title} · {name}" if len(parts) > 1 else title


def names_of(parts: Parts) -> list[str]:
    """The names of the models."""
    return [part["name"] for part in parts]


def per_layer(parts: Parts, metric: str, field: str, *, first: int = 0, where: str = "layer {}") -> Rows:
    """Rows of a curve from a list with one value per layer."""
    return [
        {"at": first + index, "where": where.format(first + index), "value": value, "model": name, "kind": ""}
        for name, result in found(parts, metric)
        for index, value in enumerate(result[field])
    ]


def per_sublayer(parts: Parts, metric: str, field: str, names: str = "sublayer_names") -> Rows:
    """Rows of a curve from a list with one value per sublayer; attention and MLP are kinds of their own."""
    rows = []
    for model, result in found(parts, metric):
        for name, value in zip(result[names], result[field], strict=True):
            kind, layer = name.split()
            rows.append({"at": int(layer), "where": name, "value": value, "model": model, "kind": _KINDS[kind]})
    return rows


def matrix_rows(matrix: list[list[float | None]], lines: Sequence[str], columns: Sequence[str]) -> Rows:
    """Rows of a heat map."""
    return [
        {"line": line, "column": column, "value": value}
        for line, row in zip(lines, matrix, strict=True)
        for column, value in zip(columns, row, strict=True)
        if value is not None
    ]


def largest(rows: Rows) -> float:
    """The largest value, 0 if there is none."""
    return max((row["value"] for row in rows if row["value"] is not None), default=0.0)


def _curve(parts: Parts, title: str, rows: Rows, y: str, *, x: str = "layer", **options) -> list[Panel]:
    known = [row for row in rows if row["value"] is not None]
    return [Panel(title, curve(known, x=x, y=y, models=names_of(parts), **options))] if known else []


def usefulness(parts: Parts) -> list[Panel]:
    """Loss ratios with the threshold, at both levels."""
    panels = []
    for level, rows in (
        ("layer", per_layer(parts, "usefulness_layer", "ratios")),
        ("sublayer", per_sublayer(parts, "usefulness_sublayer", "ratios", "names")),
    ):
        thresholds = [result["threshold"] for _, result in found(parts, f"usefulness_{level}")]
        if rows:
            rule = (thresholds[0], f"useful above {thresholds[0]:g}")
            panels += _curve(parts, f"An affine map replaces a {level}", rows, "loss with the map / loss", rule=rule)
    return panels


def causal(parts: Parts) -> list[Panel]:
    """Matrices, means of their rows, and the losses without a layer."""
    panels = []
    for metric, level in (("causal_scores", "layer"), ("causal_scores_sublayer", "sublayer")):
        top = max((largest(_causal_rows(result)) for _, result in found(parts, metric)), default=0.0)
        for name, result in found(parts, metric):
            names = [_number(text) if level == "layer" else text for text in result["names"]]
            cells = _causal_rows(result)
            if not cells:
                continue
            chart = heat_map(
                cells,
                x=f"later {level}",
                y=f"skipped {level}",
                value="relative change C(s, l)",
                columns=names[1:],
                lines=names[:-1],
                domain=(0.0, top or 1.0),
            )
            panels.append(Panel(titled(parts, name, f"What a skipped {level} changes later"), chart))
    scores = per_layer(parts, "causal_scores", "per_skipped")
    panels += _curve(parts, "Mean change of all later layers", scores, "mean C(s, ·)", x="skipped layer", zero=True)
    increases = per_layer(parts, "causal_scores", "loss_increase")
    panels += _curve(
        parts, "Loss without the layer", increases, "loss increase (nats)", x="skipped layer", rule=(0, "none")
    )
    return panels


def _causal_rows(result: dict[str, Any]) -> Rows:
    names = [_number(text) if result["level"] == "layer" else text for text in result["names"]]
    return matrix_rows(result["scores"], names, names)


def _number(name: str) -> str:
    return name.removeprefix("layer ")


def permutation(parts: Parts) -> list[Panel]:
    """Losses with neighbours swapped, and the matrix of all pairs."""
    rows = []
    for name, result in found(parts, "permutation_adjacent"):
        for index, line in enumerate(result["loss_increase"][:-1]):
            where = f"{index} and {index + 1}"
            rows.append({"at": index, "where": where, "value": line[index + 1], "model": name, "kind": ""})
    panels = _curve(
        parts,
        "Neighbours swapped",
        rows,
        "loss increase (nats)",
        x="first layer of the pair",
        rule=(0, "none"),
        zero=True,
    )
    matrices = {
        name: matrix_rows(result["scores"], *[_numbers(len(result["scores"]))] * 2)
        for name, result in found(parts, "permutation_all")
    }
    top = max(map(largest, matrices.values()), default=0.0)
    for name, cells in matrices.items():
        if not cells:
            continue
        numbers = list(dict.fromkeys(row["line"] for row in cells))
        chart = heat_map(
            cells, x="layer", y="layer", value="|loss change| / loss", columns=numbers, lines=numbers, domain=(0, top)
        )
        panels.append(Panel(titled(parts, name, "Any two layers swapped"), chart))
    return panels


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def logit_lens(parts: Parts) -> list[Panel]:
    """What the model would predict from every state."""
    state = "state before layer"
    return [
        *_curve(
            parts,
            "Loss read from each state",
            per_layer(parts, "logit_lens", "cross_entropy", where="state {}"),
            "loss (nats)",
            x=state,
        ),
        *_curve(
            parts,
            "Distance to the final prediction",
            per_layer(parts, "logit_lens", "kl", where="state {}"),
            "KL (nats)",
            x=state,
            zero=True,
        ),
        *_curve(
            parts,
            "Share of the final top five",
            per_layer(parts, "logit_lens", "top5_overlap", where="state {}"),
            "top-5 overlap",
            x=state,
            zero=True,
        ),
    ]


def contribution(parts: Parts) -> list[Panel]:
    """Relative sizes and directions of what is added."""
    metric = "relative_contribution"
    return [
        *_curve(
            parts, "Size of a layer's update", per_layer(parts, metric, "layers"), "‖update‖ / ‖state‖", zero=True
        ),
        *_curve(
            parts,
            "Direction of a layer's update",
            per_layer(parts, metric, "layer_cosines"),
            "cos(update, state)",
            rule=(0, "neither writes nor erases"),
        ),
        *_curve(
            parts,
            "Size of a sublayer's output",
            per_sublayer(parts, metric, "sublayers"),
            "‖output‖ / ‖input‖",
            zero=True,
        ),
        *_curve(
            parts,
            "Direction of a sublayer's output",
            per_sublayer(parts, metric, "sublayer_cosines"),
            "cos(output, input)",
            rule=(0, "neither writes nor erases"),
        ),
    ]


def magnitude(parts: Parts) -> list[Panel]:
    """Sizes and variances of states and outputs."""
    state = "state before layer"
    panels = [
        *_curve(
            parts,
            "States",
            per_layer(parts, "output_magnitude", "states", where="state {}"),
            "root mean square (log scale)",
            x=state,
            log=True,
        ),
        *_curve(
            parts,
            "Sublayer outputs",
            per_sublayer(parts, "output_magnitude", "sublayers"),
            "root mean square (log scale)",
            log=True,
        ),
        *_curve(
            parts,
            "Variance of the states",
            per_layer(parts, "output_variance", "states", where="state {}"),
            "variance over channels (log scale)",
            x=state,
            log=True,
        ),
    ]
    rows = [
        {"column": "emb." if index == 0 else str(index), "value": value, "kind": name}
        for name, result in found(parts, "output_magnitude")
        if result["sources"] is not None
        for index, value in enumerate(result["sources"])
        if value is not None
    ]
    if rows:
        columns = list(dict.fromkeys(row["column"] for row in rows))
        chart = bars(
            rows, x="source (embedding, blocks)", y="root mean square", columns=columns, kinds=names_of(parts)
        )
        panels.append(Panel("Sources at the output (AttnRes)", chart))
    return panels


def similarity(parts: Parts) -> list[Panel]:
    """Angles between states."""
    panels = [
        *_curve(
            parts,
            "From one state to the next",
            per_layer(parts, "angular_distance", "adjacent"),
            "angle / π",
            zero=True,
        ),
        *_curve(
            parts, "Block influence", per_layer(parts, "block_influence", "scores"), "1 − cos(in, out)", zero=True
        ),
    ]
    for name, result in found(parts, "angular_distance"):
        numbers = _numbers(len(result["distances"]))
        cells = matrix_rows(result["distances"], numbers, numbers)
        if not cells:
            continue
        chart = heat_map(
            cells,
            x="state",
            y="state",
            value="angle / π",
            columns=numbers[1:],
            lines=numbers[:-1],
            # 0.5 is a right angle: the same colours in every report.
            domain=(0.0, 0.6),
        )
        panels.append(Panel(titled(parts, name, "Any two states"), chart))
    return panels


def gradient(parts: Parts) -> list[Panel]:
    """Gradient norms of layers and sublayer outputs."""
    return [
        *_curve(
            parts,
            "Parameters of a layer",
            per_layer(parts, "gradient_magnitude", "layer_parameters"),
            "gradient norm",
            zero=True,
        ),
        *_curve(
            parts,
            "Outputs of a sublayer",
            per_sublayer(parts, "gradient_magnitude", "sublayer_outputs"),
            "gradient norm",
            zero=True,
        ),
        *_curve(
            parts,
            "Depth parameters of a layer",
            per_layer(parts, "gradient_magnitude", "depth_parameters"),
            "gradient norm",
            zero=True,
        ),
    ]


def jacobian(parts: Parts) -> list[Panel]:
    """Distances of the layers' Jacobians from the identity."""
    y = "‖J − I‖ / D"
    return [
        *_curve(parts, "Gap per sequence", per_layer(parts, "jacobian_gap", "jacobian_identity_gap"), y, zero=True),
        *_curve(
            parts,
            "Gap of the mean Jacobian",
            per_layer(parts, "jacobian_gap", "mean_jacobian_identity_gap"),
            y,
            zero=True,
        ),
    ]
