"""Figure of causal scores, and of the loss without a layer."""

from __future__ import annotations

from ..charts import Rows, bars, heat_map
from ..figure import Figure, LayerLine, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import curve_panels, found, largest, matrix_rows, names_of, per_layer, titled
from ..sentences import argmax, argmin, field_text, field_values, no_number, number, signed


def _panels(models: Models) -> list[Panel]:
    """Draw the matrices, their row means, and the losses without a layer."""
    panels = []
    for metric, level in (("causal_scores", "layer"), ("causal_scores_sublayer", "sublayer")):
        top = max((largest(_cells(result)) for _, result in found(models, metric)), default=0.0)
        for name, result in found(models, metric):
            names, cells = _names(result), _cells(result)
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
            panels.append(Panel(titled(models, name, f"Effect of skipping a {level} on later ones"), chart))
    scores = per_layer(models, "causal_scores", "per_skipped")
    panels += curve_panels(
        models, "Mean change of all later layers", scores, "mean C(s, ·)", x="skipped layer", zero=True
    )
    increases = per_layer(models, "causal_scores", "loss_increase")
    panels += curve_panels(
        models, "Loss without the layer", increases, "loss increase (nats)", x="skipped layer", rule=(0, "none")
    )
    return panels


def _names(result: StoredResult) -> list[str]:
    return [name.removeprefix("layer ") for name in result["names"]]


def _cells(result: StoredResult) -> Rows:
    return matrix_rows(result["scores"], _names(result), _names(result))


def _findings(models: Models) -> list[str]:
    """Name the layers whose skip costs most and least, and the conventions."""
    said = []
    for name, result in found(models, "causal_scores"):
        losses = result["loss_increase"]
        worst, least = argmax(losses), argmin(losses)
        if worst is None or least is None:
            said.append(no_number(name))
            continue
        said.append(
            f"{name}: mean score {number(result['mean'])}. Skipping layer {worst} increases the loss most "
            f"({signed(losses[worst])} nats), layer {least} least ({signed(losses[least])}). Conventions: slots = "
            f"{result['slots']}, mix = {result['mix']} (only relevant for MoDA and AttnRes)."
        )
    return said


def _layer_panels(models: Models) -> list[Panel]:
    """Draw how much every later layer changes without this one."""
    rows: Rows = []
    columns: list[str] = []
    for name, result in found(models, "causal_scores"):
        for layer, scores in enumerate(result["scores"]):
            rows += [
                {"layer": layer, "column": str(later), "value": score, "kind": name}
                for later, score in enumerate(scores)
                if score is not None
            ]
        columns = max(columns, [str(later) for later in range(1, len(result["scores"]))], key=len)
    if not rows:
        return []
    chart = bars(
        rows,
        x="later layer",
        y="relative change C(s, l)",
        columns=columns,
        limit=max(row["value"] for row in rows),
        kinds=names_of(models),
        by_layer=True,
    )
    return [Panel("Effect of skipping it on later layers", chart)]


FIGURE = Figure(
    place=80,
    title="How later layers depend on a layer (causal scores)",
    how=(
        "Each layer is skipped in turn. Rows are skipped layers, columns later layers; the value is the change of the "
        "later layer's update, relative to its size. If later layers hardly change, layers work independently and the "
        "model makes less use of its depth. The last curve is the loss without the layer."
    ),
    limits=(
        "A change is not necessarily harmful: see the loss. Only the mean is comparable between models of different "
        "depth. What skipping means depends on the family; the conventions are given above and in report.json."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            40,
            "mean causal score",
            "Change of later layers when one is skipped; higher means that layers build on each other.",
            "causal_scores",
            field_text("mean"),
        ),
    ),
    layer_lines=(
        LayerLine(10, "loss increase without the layer (nats)", "causal_scores", field_values("loss_increase")),
        LayerLine(20, "mean change of later layers", "causal_scores", field_values("per_skipped")),
    ),
    layer_panels=_layer_panels,
)
