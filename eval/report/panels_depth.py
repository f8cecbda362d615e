"""Panels of the metrics that models with depth attention have: AttnRes sources, MoDA slots, and their ablations."""

from __future__ import annotations

from typing import Any

from .charts import Rows, bars, curve, drop_beside_controls, heat_map
from .panels import Panel, Parts, found, largest, matrix_rows, names_of, titled

# Weights within this of uniform are not stretched over the whole colour scale.
_LEAST_SPREAD = 0.1


def source_names(count: int) -> list[str]:
    """The embedding, and blocks by number."""
    return ["emb.", *(str(number) for number in range(1, count))]


def weight_cells(result: dict[str, Any]) -> Rows:
    """Rows of the heat maps of depth weights: alpha * n, alpha, its deviation over tokens."""
    names = source_names(len(result["means"][0]))
    rows = []
    for site, means, variances in zip(result["sites"], result["means"], result["variances"], strict=True):
        number = sum(mean is not None for mean in means)
        # A site with a single source reads it whatever the model has learnt.
        if number < 2:
            continue
        for name, mean, variance in zip(names, means, variances, strict=True):
            if mean is not None:
                cell = {"line": site, "column": name, "value": mean * number, "mean": mean}
                rows.append({**cell, "deviation": variance**0.5})
    return rows


def depth_weights(parts: Parts) -> list[Panel]:
    """Heat maps of alpha * n on one colour scale: reads before attention, reads before the MLP and the output."""
    cells = {name: weight_cells(result) for name, result in found(parts, "depth_weights")}
    spread = max((abs(row["value"] - 1) for rows in cells.values() for row in rows), default=0.0)
    spread = max(spread, _LEAST_SPREAD)
    panels = []
    for name, result in found(parts, "depth_weights"):
        columns = source_names(len(result["means"][0]))
        for title, is_here in (
            ("Reads before attention", lambda site: site.startswith("attn")),
            ("Reads before the MLP, and the output", lambda site: not site.startswith("attn")),
        ):
            rows = [row for row in cells[name] if is_here(row["line"])]
            if not rows:
                continue
            chart = heat_map(
                rows,
                x="source (embedding, blocks)",
                y="site",
                value="weight × sources (1 = uniform)",
                columns=columns,
                lines=list(dict.fromkeys(row["line"] for row in rows)),
                domain=(max(0.0, 1 - spread), 1 + spread),
                middle=1.0,
                more=(("mean", "mean weight"), ("deviation", "std over tokens")),
            )
            panels.append(Panel(titled(parts, name, title), chart))
    return panels


def depth_weight_sites(parts: Parts) -> list[Panel]:
    """Entropy of the reads and size of the queries, per site."""
    panels = []
    for field, title, y in (
        ("entropies", "How even the reads are", "entropy / log n (1 = uniform)"),
        ("query_norms", "Size of the queries", "norm of query × key-norm weight"),
    ):
        rows = []
        for name, result in found(parts, "depth_weights"):
            for site, value in zip(result["sites"], result[field], strict=True):
                kind, _, layer = site.partition(" ")
                # The output is no layer; it stands behind the last one.
                at = int(layer) if layer else len(result["sites"]) // 2
                shown = {"attn": "before attention", "mlp": "before the MLP"}.get(kind, "output")
                rows.append({"at": at, "where": site, "value": value, "model": name, "kind": shown})
        # In this order, so that a kind has the same line in both panels.
        kinds = ["before attention", "before the MLP", "output"]
        rows = sorted((row for row in rows if row["value"] is not None), key=lambda row: kinds.index(row["kind"]))
        if rows:
            panels.append(Panel(title, curve(rows, models=names_of(parts), x="layer", y=y)))
    return panels


def source_drop(parts: Parts) -> list[Panel]:
    """The old sources dropped, beside random drops of as many."""
    rows = []
    for name, result in found(parts, "source_drop_old"):
        rows.append({"line": name, "value": result["increase"], "kind": "measured"})
        rows += [{"line": name, "value": v, "kind": "random control"} for v in result["control_increases"]]
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return []
    names = list(dict.fromkeys(row["line"] for row in rows))
    title = "Old sources dropped at all sites"
    chart = drop_beside_controls(rows, x="loss increase (nats)")
    return [Panel(titled(parts, names[0], title) if len(names) == 1 else title, chart)]


def source_drop_matrix(parts: Parts) -> list[Panel]:
    """Loss increases of single drops."""
    cells = {}
    for name, result in found(parts, "source_drop_matrix"):
        sites = _site_names(len(result["increases"]))
        rows = matrix_rows(result["increases"], sites, source_names(len(result["increases"][0])))
        controls = matrix_rows(result["controls"], sites, source_names(len(result["increases"][0])))
        control = {(row["line"], row["column"]): row["value"] for row in controls}
        cells[name] = [{**row, "control": control.get((row["line"], row["column"]))} for row in rows]
    spread = max((abs(row["value"]) for rows in cells.values() for row in rows), default=0.0) or 1.0
    panels = []
    for name, rows in cells.items():
        if not rows:
            continue
        chart = heat_map(
            rows,
            x="dropped source",
            y="site",
            value="loss increase (nats)",
            columns=list(dict.fromkeys(sorted((row["column"] for row in rows), key=_source_order))),
            lines=list(dict.fromkeys(row["line"] for row in rows)),
            domain=(-spread, spread),
            middle=0.0,
            more=(("control", "mean of the site's other sources"),),
        )
        panels.append(Panel(titled(parts, name, "One source dropped at one site"), chart))
    return panels


def _source_order(name: str) -> int:
    return 0 if name == "emb." else int(name)


def _site_names(count: int) -> list[str]:
    return [*(f"{kind} {layer}" for layer in range(count // 2) for kind in ("attn", "mlp")), "output"]


def slot_mass(parts: Parts) -> list[Panel]:
    """Mass on depth slots by layer, by head, by slot and by age."""
    rows = []
    for name, result in found(parts, "slot_mass"):
        for layer, heads in enumerate(result["totals"]):
            known = [mass for mass in heads if mass is not None]
            values = {
                "this model": sum(known) / len(known) if known else None,
                "uniform attention": result["uniform"][layer],
            }
            for kind, value in values.items():
                if value is not None:
                    where = f"layer {layer}"
                    rows.append({"at": layer, "where": where, "value": value, "model": name, "kind": kind})
    if not rows:
        return []
    panels = [
        Panel(
            "All slots together, mean over heads",
            curve(rows, models=names_of(parts), x="layer", y="mass on depth slots", zero=True),
        )
    ]
    for name, result in found(parts, "slot_mass"):
        numbers = [str(layer) for layer in range(len(result["totals"]))]
        by_slot = [
            [_mean(head[slot] for head in layer) for slot in range(len(result["slots"]))]
            for layer in result["by_slot"]
        ]
        heads = [str(head) for head in range(len(result["totals"][0]))]
        ages = [str(age) for age in range(len(numbers))]
        for title, x, lines, columns, matrix in (
            ("By layer and head", "head", numbers, heads, result["totals"]),
            ("By layer and slot, mean over heads", "slot", numbers, result["slots"], by_slot),
            ("Attention slots by age", "age (layers)", numbers, ages, result["attention_by_age"]),
            ("MLP slots by age", "age (layers)", numbers, ages, result["mlp_by_age"]),
        ):
            cells = matrix_rows(matrix, lines, columns)
            if cells:
                panels.append(Panel(titled(parts, name, title), _mass_map(cells, x, columns)))
    return panels


def _mass_map(cells: Rows, x: str, columns: list[str]):
    top, low = largest(cells), min(row["value"] for row in cells)
    present = {row["column"] for row in cells}
    signed = low < 0
    end = max(top, -low) or 1.0
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


def slot_drop(parts: Parts) -> list[Panel]:
    """Loss increases without a slot, and without the slots of a layer."""
    panels = []
    for name, result in found(parts, "slot_drop"):
        rows = [
            {"column": slot, "value": value, "control": control, "kind": name}
            for slot, value, control in zip(
                result["slots"], result["by_slot"], result["by_slot_controls"], strict=True
            )
        ]
        # A single layer has no slots to read.
        if not any(row["value"] is not None for row in rows):
            continue
        chart = bars(
            rows,
            x="dropped slot",
            y="loss increase (nats)",
            columns=result["slots"],
            kinds=names_of(parts),
            controls="mean of the other slots",
        )
        panels.append(Panel(titled(parts, name, "One slot dropped in all layers"), chart))
    rows = [
        {"at": layer, "where": f"layer {layer}", "value": value, "model": name, "kind": ""}
        for name, result in found(parts, "slot_drop")
        for layer, value in enumerate(result["by_layer"])
        if value is not None
    ]
    if rows:
        panels.append(
            Panel(
                "One layer reads no slots",
                curve(rows, models=names_of(parts), x="layer", y="loss increase (nats)", zero=True),
            )
        )
    return panels


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
