"""Figure of the attention mass on MoDA's depth slots by layer, head, slot and age."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from ..charts import Rows, heat_map
from ..figure import Figure, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import curve_panels, found, largest, matrix_rows, numbers, titled
from ..sentences import known, mean, no_number

# Above this number of cells the page gets slow, and only means over heads are shown.
_MOST_HEAD_CELLS = 6000


def _panels(models: Models) -> list[Panel]:
    rows: Rows = []
    for name, result in found(models, "slot_mass"):
        for layer, heads in enumerate(result["totals"]):
            for kind, value in (("this model", mean(heads)), ("uniform attention", result["uniform"][layer])):
                rows.append({"at": layer, "where": f"layer {layer}", "value": value, "model": name, "kind": kind})
    panels = curve_panels(models, "All slots together, mean over heads", rows, "mass on depth slots", zero=True)
    if not panels:
        return []
    for name, result in found(models, "slot_mass"):
        layers = numbers(len(result["totals"]))
        by_slot = [
            [mean(head[slot] for head in layer) for slot in range(len(result["slots"]))] for layer in result["by_slot"]
        ]
        heads = numbers(len(result["totals"][0]))
        for title, x, columns, matrix in (
            ("By layer and head", "head", heads, result["totals"]),
            ("By layer and slot, mean over heads", "slot", result["slots"], by_slot),
            ("Attention slots by age", "age (layers)", layers, result["attention_by_age"]),
            ("MLP slots by age", "age (layers)", layers, result["mlp_by_age"]),
        ):
            cells = matrix_rows(matrix, layers, columns)
            if cells:
                panels.append(Panel(titled(models, name, title), _mass_map(cells, x, columns)))
    return panels


def _mass_map(cells: Rows, x: str, columns: Sequence[str]) -> alt.Chart:
    low = min(row["value"] for row in cells)
    present = {row["column"] for row in cells}
    signed = low < 0
    end = max(largest(cells), -low) or 1.0
    return heat_map(
        cells,
        x=x,
        y="layer",
        value="mass",
        columns=[column for column in columns if column in present],
        lines=list(dict.fromkeys(row["line"] for row in cells)),
        domain=(-end, end) if signed else (0.0, end),
        middle=0.0 if signed else None,
    )


def _findings(models: Models) -> list[str]:
    """Compare the total mass with uniform attention."""
    said = []
    for name, result in found(models, "slot_mass"):
        totals = known(mass for layer in result["totals"] for mass in layer)
        uniform = known(result["uniform"])
        if not totals:
            # A single layer has no slots to read.
            said += [no_number(name)] if result["slots"] else []
            continue
        sentence = (
            f"{name}: mean mass on depth slots {sum(totals) / len(totals):+.4f}; uniform attention would give "
            f"{sum(uniform) / len(uniform):.3f}."
        )
        if result["gated"]:
            sentence += (
                " The mass includes the gate of each head: it is 0 for a closed gate and negative for a negative one."
            )
        said.append(sentence)
    return said


def _mean_mass(result: StoredResult) -> str | None:
    totals = known(mass for layer in result["totals"] for mass in layer)
    uniform = known(result["uniform"])
    return f"{sum(totals) / len(totals):+.4f} (uniform {sum(uniform) / len(uniform):.3f})" if totals else None


def _layer_panels(models: Models) -> list[Panel]:
    """Draw the mass of the slots that one layer reads, by head."""
    panels = []
    for name, result in found(models, "slot_mass"):
        by_slot = result["by_slot"]
        num_heads = len(by_slot[0])
        by_head = len(by_slot) * num_heads * len(result["slots"]) <= _MOST_HEAD_CELLS
        rows: Rows = []
        for layer, heads in enumerate(by_slot):
            for slot, column in enumerate(result["slots"]):
                masses = [head[slot] for head in heads]
                if None in masses:
                    continue
                lines = (
                    zip(numbers(num_heads), masses, strict=True) if by_head else [("mean", sum(masses) / num_heads)]
                )
                rows += [{"layer": layer, "column": column, "line": line, "value": mass} for line, mass in lines]
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
        panels.append(Panel(titled(models, name, "Mass on depth slots of its heads (MoDA)"), chart))
    return panels


FIGURE = Figure(
    place=50,
    title="Attention mass on depth slots (MoDA)",
    how=(
        "One softmax covers the keys of the sequence and the depth slots, i.e. keys and values that earlier sublayers "
        "wrote for the same token. The mass is the total weight of slots. The age of a slot is the number of layers "
        "since it was written. The dashed line is uniform attention over all keys and slots."
    ),
    limits=(
        "Mass does not measure importance; use --full to drop slots and measure their effect. Gates are included: the "
        "mass is 0 for a closed gate, whatever the attention weights are, and negative for a negative one. Early "
        "tokens have few keys and therefore more mass on slots, so the mass depends on the window length. The uniform "
        "line assumes full causal attention, not a sliding window."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            110,
            "mass on depth slots",
            "Attention weight on slots of earlier layers, including gates.",
            "slot_mass",
            _mean_mass,
        ),
    ),
    layer_panels=_layer_panels,
)
