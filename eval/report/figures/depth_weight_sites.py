"""Figure of the entropy of AttnRes reads and the norm of their queries, per site."""

from __future__ import annotations

from ..charts import Rows
from ..figure import Figure, Models, Panel
from ..rows import curve_panels, found

# Fixed order, so that a kind has the same line style in both panels.
_KINDS = ("before attention", "before the MLP", "output")


def _panels(models: Models) -> list[Panel]:
    panels = []
    for field, title, y in (
        ("entropies", "Entropy of the reads", "entropy / log n (1 = uniform)"),
        ("query_norms", "Norm of the queries", "norm of query × key-norm weight"),
    ):
        rows: Rows = []
        for name, result in found(models, "depth_weights"):
            for site, value in zip(result["sites"], result[field], strict=True):
                kind, _, layer = site.partition(" ")
                # The output site belongs to no layer and is shown after the last one.
                at = int(layer) if layer else len(result["sites"]) // 2
                shown = {"attn": "before attention", "mlp": "before the MLP"}.get(kind, "output")
                rows.append({"at": at, "where": site, "value": value, "model": name, "kind": shown})
        panels += curve_panels(models, title, sorted(rows, key=lambda row: _KINDS.index(row["kind"])), y)
    return panels


def _findings(models: Models) -> list[str]:
    """Name the read with the lowest entropy."""
    said = []
    for name, result in found(models, "depth_weights"):
        entropies = [
            (value, site)
            for value, site in zip(result["entropies"], result["sites"], strict=True)
            if value is not None
        ]
        # Untrained reads are uniform up to rounding.
        if entropies and min(entropies)[0] > 1 - 1e-6:
            said.append(f"{name}: all reads are uniform.")
        elif entropies:
            mean = sum(value for value, _ in entropies) / len(entropies)
            said.append(
                f"{name}: mean entropy {mean:.3f} of at most 1; the most selective read is {min(entropies)[1]} with "
                f"{min(entropies)[0]:.3f}."
            )
    return said


FIGURE = Figure(
    place=40,
    title="How selective the reads are (AttnRes)",
    how=(
        "An entropy of 1 means uniform weights over all sources, 0 means a single source. The query norm shows how "
        "far training has moved a read from its start: 0 means uniform weights."
    ),
    limits=(
        "A selective read is not necessarily useful. Query norms can grow without effect if the keys of the sources "
        "are similar."
    ),
    panels=_panels,
    findings=_findings,
)
