"""The effective-depth summary of a report: a few numbers per model, each with what it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .findings import first_state_with
from .health import has_no_loss

Part = dict[str, Any]


@dataclass(frozen=True)
class SummaryRow:
    """One line of the summary.

    Attributes:
        title: what it is.
        values: one text per model.
        meaning: one sentence.
    """

    title: str
    values: tuple[str, ...]
    meaning: str


def summary_rows(report: dict[str, Any]) -> list[SummaryRow]:
    """The lines for which at least one model has a number."""
    parts = [part for part in (report["model"], report["compare"]) if part is not None]
    rows = []
    for title, value_of, meaning in _ROWS:
        values = [value_of(part) for part in parts]
        if any(value is not None for value in values):
            rows.append(SummaryRow(title, tuple("–" if value is None else value for value in values), meaning))
    return rows


def _of(metric: str, value_of: Callable[[dict[str, Any]], str | None]) -> Callable[[Part], str | None]:
    def value_in(part: Part) -> str | None:
        if metric not in part["metrics"]:
            return None
        value = value_of(part["metrics"][metric])
        # Of a model that works, a number that does not exist has another reason: two layers have no inner pair.
        return "NaN" if value is None and has_no_loss(part) else value

    return value_in


def _field(metric: str, name: str, form: str = ".3f") -> Callable[[Part], str | None]:
    return _of(metric, lambda result: None if result[name] is None else f"{result[name]:{form}}")


def _useful(result: dict[str, Any]) -> str | None:
    if result["score"] is None:
        return None
    return f"{result['score']:.2f} ({sum(result['is_useful'])} of {len(result['is_useful'])})"


def _mean(metric: str, name: str) -> Callable[[Part], str | None]:
    def value_of(result: dict[str, Any]) -> str | None:
        known = [value for value in result[name] if value is not None]
        return f"{sum(known) / len(known):.3f}" if known else None

    return _of(metric, value_of)


def _loss(result: dict[str, Any]) -> str | None:
    loss = result["cross_entropy"][-1]
    return None if loss is None else f"{loss:.4f}"


def _depth_of_prediction(result: dict[str, Any]) -> str | None:
    overlap = result["top5_overlap"]
    if overlap[-1] is None:
        return None
    state, last = first_state_with(overlap, 0.5), len(overlap) - 1
    return f"{state / last:.2f} (state {state} of {last})"


def _drop(result: dict[str, Any]) -> str | None:
    if result["increase"] is None or result["control_mean"] is None:
        return None
    spread = "" if result["control_std"] is None else f" ± {result['control_std']:.3f}"
    return f"{result['increase']:+.3f} (random {result['control_mean']:+.3f}{spread})"


def _slots(result: dict[str, Any]) -> str | None:
    known = [mass for layer in result["totals"] for mass in layer if mass is not None]
    uniform = [value for value in result["uniform"] if value is not None]
    return f"{sum(known) / len(known):+.4f} (uniform {sum(uniform) / len(uniform):.3f})" if known else None


_ROWS: tuple[tuple[str, Callable[[Part], str | None], str], ...] = (
    ("family", lambda part: part["info"]["family"], "How layers are connected; it decides the conventions."),
    (
        "layers × width",
        lambda part: f"{part['info']['num_layers']} × {part['info']['hidden_size']}",
        "Compare models of the same shape; depth moves every number below.",
    ),
    (
        "query / key-value heads",
        lambda part: f"{part['info']['num_attention_heads']} / {part['info']['num_key_value_heads']}",
        "This ratio moves usefulness as well; so does weight decay, which a checkpoint does not tell.",
    ),
    (
        "loss (nats per token)",
        _of("logit_lens", _loss),
        "Of the model on this text. Comparable between models with the same tokens only.",
    ),
    (
        "usefulness U, layers",
        _of("usefulness_layer", _useful),
        "Share of layers that no affine map can stand in for; residual models only.",
    ),
    (
        "usefulness U, sublayers",
        _of("usefulness_sublayer", _useful),
        "The same for attention and MLP sublayers, for all families. Not the scale of the line above.",
    ),
    (
        "mean causal score",
        _field("causal_scores", "mean"),
        "How much later layers change when one is skipped; higher means that layers build on each other.",
    ),
    (
        "neighbours swapped, inner pairs",
        _field("permutation_adjacent", "inner_mean"),
        "Relative change of the loss; higher means that the order matters. First and last layer left out.",
    ),
    (
        "neighbours swapped, edge pairs",
        _field("permutation_adjacent", "edge_mean"),
        "Pairs with the first or the last layer, which would dominate a common mean.",
    ),
    (
        "depth of the prediction",
        _of("logit_lens", _depth_of_prediction),
        "First state, relative to all, whose five likeliest tokens share half with the final ones.",
    ),
    (
        "mean turn per layer (angle / π)",
        _mean("angular_distance", "adjacent"),
        "How far a layer turns the state; a poor proxy of importance.",
    ),
    (
        "mean block influence",
        _mean("block_influence", "scores"),
        "1 − cosine between a layer's input and output; also a poor proxy.",
    ),
    (
        "old sources dropped (nats)",
        _of("source_drop_old", _drop),
        "Loss change without the older sources, beside random drops of as many (± their std).",
    ),
    (
        "mass on depth slots",
        _of("slot_mass", _slots),
        "Share of attention that goes to earlier layers, gates included.",
    ),
)
