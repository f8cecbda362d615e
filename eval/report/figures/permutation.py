"""Figure of permutation scores: losses with two layers swapped."""

from __future__ import annotations

from ..charts import Rows, heat_map
from ..figure import Figure, Models, Panel, SummaryLine
from ..rows import curve_panels, found, largest, matrix_rows, numbers, titled
from ..sentences import field_text, percent


def _panels(models: Models) -> list[Panel]:
    """Draw the losses with neighbours swapped, and the matrix of all pairs."""
    rows: Rows = []
    for name, result in found(models, "permutation_adjacent"):
        for index, line in enumerate(result["loss_increase"][:-1]):
            where = f"{index} and {index + 1}"
            rows.append({"at": index, "where": where, "value": line[index + 1], "model": name, "kind": ""})
    panels = curve_panels(
        models,
        "Neighbours swapped",
        rows,
        "loss increase (nats)",
        x="first layer of the pair",
        rule=(0, "none"),
        zero=True,
    )
    matrices = {}
    for name, result in found(models, "permutation_all"):
        layers = numbers(len(result["scores"]))
        matrices[name] = matrix_rows(result["scores"], layers, layers)
    top = max(map(largest, matrices.values()), default=0.0)
    for name, cells in matrices.items():
        if not cells:
            continue
        layers = list(dict.fromkeys(row["line"] for row in cells))
        chart = heat_map(
            cells, x="layer", y="layer", value="|loss change| / loss", columns=layers, lines=layers, domain=(0, top)
        )
        panels.append(Panel(titled(models, name, "Any two layers swapped"), chart))
    return panels


def _findings(models: Models) -> list[str]:
    """State the means of all, inner and edge pairs."""
    said = []
    for name, result in found(models, "permutation_adjacent"):
        said.append(
            f"{name}: swapping neighbours changes the loss by {percent(result['mean'])} on average, by "
            f"{percent(result['inner_mean'])} for pairs without the first and last layer, and by "
            f"{percent(result['edge_mean'])} for the others."
        )
        if result["num_unfit_pairs"]:
            said.append(f"{name}: {result['num_unfit_pairs']} pairs differ in weight shapes and were skipped.")
    return said


FIGURE = Figure(
    place=90,
    title="Does the order of layers matter? (permutation score)",
    how=(
        "Two layers swap their weights. If the loss hardly changes, their order does not matter and they do similar "
        "work."
    ),
    limits=(
        "Pairs with the first or last layer dominate the mean and are reported separately. Only neighbours are "
        "swapped unless --full is given. A decrease of the loss (below 0) is usually noise of a short text."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            50,
            "neighbours swapped, inner pairs",
            "Relative change of the loss without the first and last layer; higher means that the order matters.",
            "permutation_adjacent",
            field_text("inner_mean"),
        ),
        SummaryLine(
            60,
            "neighbours swapped, edge pairs",
            "The same for pairs with the first or last layer, which would dominate a common mean.",
            "permutation_adjacent",
            field_text("edge_mean"),
        ),
    ),
)
