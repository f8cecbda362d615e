"""Figure of root mean squares and variances of states and outputs."""

from __future__ import annotations

from ..charts import Rows, bars
from ..figure import Figure, Models, Panel
from ..rows import curve_panels, found, names_of, per_layer, per_sublayer


def _panels(models: Models) -> list[Panel]:
    panels = [
        *curve_panels(
            models,
            "States",
            per_layer(models, "output_magnitude", "states", where="state {}"),
            "root mean square (log scale)",
            x="state before layer",
            log=True,
        ),
        *curve_panels(
            models,
            "Sublayer outputs",
            per_sublayer(models, "output_magnitude", "sublayers"),
            "root mean square (log scale)",
            log=True,
        ),
        *curve_panels(
            models,
            "Variance of the states",
            per_layer(models, "output_variance", "states", where="state {}"),
            "variance over channels (log scale)",
            x="state before layer",
            log=True,
        ),
    ]
    rows: Rows = [
        {"column": "emb." if index == 0 else str(index), "value": value, "kind": name}
        for name, result in found(models, "output_magnitude")
        if result["sources"] is not None
        for index, value in enumerate(result["sources"])
        if value is not None
    ]
    if rows:
        columns = list(dict.fromkeys(row["column"] for row in rows))
        chart = bars(
            rows, x="source (embedding, blocks)", y="root mean square", columns=columns, kinds=names_of(models)
        )
        panels.append(Panel("Sources at the output (AttnRes)", chart))
    return panels


def _findings(models: Models) -> list[str]:
    """State the growth from the first to the last state."""
    said = []
    for name, result in found(models, "output_magnitude"):
        first, last = result["states"][0], result["states"][-1]
        if first and last:
            said.append(f"{name}: magnitude grows by a factor of {last / first:.1f} from the first to the last state.")
    return said


FIGURE = Figure(
    place=120,
    title="Magnitude of states and outputs",
    how=(
        "In residual models, states grow with depth and late layers contribute relatively less. Block AttnRes trained "
        "from scratch keeps them bounded; a retrofitted model starts with the growth of its host."
    ),
    limits=("Every sublayer normalises its input, so only relative sizes matter. The vertical axes are logarithmic."),
    panels=_panels,
    findings=_findings,
)
