"""Figure of the loss increase when one AttnRes source is dropped at one site."""

from __future__ import annotations

from ..charts import heat_map
from ..figure import Figure, Models, Panel
from ..rows import found, matrix_rows, source_names, titled
from ..sentences import argmax, known


def _panels(models: Models) -> list[Panel]:
    cells = {}
    for name, result in found(models, "source_drop_matrix"):
        sites, sources = _site_names(len(result["increases"])), source_names(len(result["increases"][0]))
        rows = matrix_rows(result["increases"], sites, sources)
        controls = matrix_rows(result["controls"], sites, sources)
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
        panels.append(Panel(titled(models, name, "One source dropped at one site"), chart))
    return panels


def _source_order(name: str) -> int:
    return 0 if name == "emb." else int(name)


def _site_names(count: int) -> list[str]:
    return [*(f"{kind} {layer}" for layer in range(count // 2) for kind in ("attn", "mlp")), "output"]


def _findings(models: Models) -> list[str]:
    """State at how many sites the largest weight and the largest effect agree."""
    said = []
    weights = dict(found(models, "depth_weights"))
    for name, result in found(models, "source_drop_matrix"):
        agree = total = 0
        for row, means in zip(result["increases"], weights[name]["means"] if name in weights else [], strict=False):
            if len(known(row)) > 1:
                total += 1
                agree += argmax(row) == argmax(means)
        if total:
            said.append(
                f"{name}: at {agree} of {total} sites, the source with the largest weight is also the one whose drop "
                "costs most."
            )
    return said


FIGURE = Figure(
    place=30,
    title="Loss without one source (AttnRes)",
    how=(
        "One read drops one source; its other weights are renormalised. The colour is the change of the loss. The "
        "tooltip shows the mean over the other sources of the same read, i.e. the expected cost of a random drop."
    ),
    limits=(
        "Redundant sources look unimportant when they are dropped one at a time. On a short text, small differences "
        "are noise."
    ),
    panels=_panels,
    findings=_findings,
)
