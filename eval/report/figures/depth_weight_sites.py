"""How choosy the AttnRes reads are: entropy of the reads and size of the queries, per site."""

from __future__ import annotations

from ..charts import Rows
from ..figure import Figure, Models, Panel
from ..rows import curve_panels, found

# In this order, so that a kind has the same line in both panels.
_KINDS = ("before attention", "before the MLP", "output")


def _panels(models: Models) -> list[Panel]:
    panels = []
    for field, title, y in (
        ("entropies", "How even the reads are", "entropy / log n (1 = uniform)"),
        ("query_norms", "Size of the queries", "norm of query × key-norm weight"),
    ):
        rows: Rows = []
        for name, result in found(models, "depth_weights"):
            for site, value in zip(result["sites"], result[field], strict=True):
                kind, _, layer = site.partition(" ")
                # The output is no layer; it stands behind the last one.
                at = int(layer) if layer else len(result["sites"]) // 2
                shown = {"attn": "before attention", "mlp": "before the MLP"}.get(kind, "output")
                rows.append({"at": at, "where": site, "value": value, "model": name, "kind": shown})
        panels += curve_panels(models, title, sorted(rows, key=lambda row: _KINDS.index(row["kind"])), y)
    return panels


def _findings(models: Models) -> list[str]:
    """The least even read."""
    said = []
    for name, result in found(models, "depth_weights"):
        entropies = [
            (value, site)
            for value, site in zip(result["entropies"], result["sites"], strict=True)
            if value is not None
        ]
        # Untrained reads are all even, up to rounding.
        if entropies and min(entropies)[0] > 1 - 1e-6:
            said.append(f"{name}: all reads are even.")
        elif entropies:
            mean = sum(value for value, _ in entropies) / len(entropies)
            said.append(
                f"{name}: mean entropy {mean:.3f} of at most 1; the least even read is {min(entropies)[1]} with "
                f"{min(entropies)[0]:.3f}."
            )
    return said


FIGURE = Figure(
    place=40,
    title="How choosy the reads are (AttnRes)",
    how=(
        "Entropy 1 is an even mix of all sources, 0 is a single source. The query norm says how far training has "
        "moved a read: 0 is the uniform start."
    ),
    limits=(
        "An uneven read is not a useful one. Query norms can grow without effect where the sources look alike to the "
        "query."
    ),
    panels=_panels,
    findings=_findings,
)
