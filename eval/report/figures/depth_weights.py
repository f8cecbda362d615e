"""Figure of the weights of AttnRes reads, as heat maps."""

from __future__ import annotations

from ..charts import Rows, bars, heat_map
from ..figure import Figure, LayerLine, Models, Panel
from ..result import StoredResult
from ..rows import found, source_names, titled
from ..sentences import known, no_number

# Smallest half-width of the colour scale, so that almost uniform weights look uniform.
_LEAST_SPREAD = 0.1


def _panels(models: Models) -> list[Panel]:
    """Draw heat maps of alpha * n on one colour scale: reads before attention, and before the MLP and the output."""
    cells = {name: _cells(result) for name, result in found(models, "depth_weights")}
    spread = max((abs(row["value"] - 1) for rows in cells.values() for row in rows), default=0.0)
    spread = max(spread, _LEAST_SPREAD)
    panels = []
    for name, result in found(models, "depth_weights"):
        before_attention = [row for row in cells[name] if row["line"].startswith("attn")]
        others = [row for row in cells[name] if not row["line"].startswith("attn")]
        for title, rows in (
            ("Reads before attention", before_attention),
            ("Reads before the MLP, and the output", others),
        ):
            if not rows:
                continue
            chart = heat_map(
                rows,
                x="source (embedding, blocks)",
                y="site",
                value="weight × sources (1 = uniform)",
                columns=source_names(len(result["means"][0])),
                lines=list(dict.fromkeys(row["line"] for row in rows)),
                domain=(max(0.0, 1 - spread), 1 + spread),
                middle=1.0,
                more=(("mean", "mean weight"), ("deviation", "std over tokens")),
            )
            panels.append(Panel(titled(models, name, title), chart))
    return panels


def _cells(result: StoredResult) -> Rows:
    """Return rows of the heat maps: alpha * n, alpha, its standard deviation over tokens."""
    names = source_names(len(result["means"][0]))
    rows = []
    for site, means, variances in zip(result["sites"], result["means"], result["variances"], strict=True):
        num_sources = len(known(means))
        # With a single source the weight is always 1.
        if num_sources < 2:
            continue
        for name, mean, variance in zip(names, means, variances, strict=True):
            if mean is not None:
                cell = {"line": site, "column": name, "value": mean * num_sources, "mean": mean}
                rows.append({**cell, "deviation": variance**0.5})
    return rows


def _findings(models: Models) -> list[str]:
    """Name the weight that is furthest from uniform."""
    said = []
    for name, result in found(models, "depth_weights"):
        cells = _cells(result)
        furthest = max(cells, key=lambda row: abs(row["value"] - 1), default=None)
        if furthest is None:
            said.append(no_number(name))
            continue
        if abs(furthest["value"] - 1) < 1e-4:
            said.append(f"{name}: every read is uniform; the queries have not been trained.")
            continue
        own = _newest_favoured(result)
        said.append(
            f"{name}: the weight furthest from uniform is that of {furthest['line']} on source {furthest['column']}, "
            f"{furthest['value']:.2f} times the uniform weight. {own} The largest standard deviation over tokens is "
            f"{max(row['deviation'] for row in cells):.3f}; 0 would mean that weights do not depend on the token."
        )
    return said


def _newest_favoured(result: StoredResult) -> str:
    rows = [
        (means, top) for means, top in zip(result["means"], result["argmax"], strict=True) if len(known(means)) > 1
    ]
    newest = sum(top == max(i for i, mean in enumerate(means) if mean is not None) for means, top in rows)
    embedding = sum(top == 0 for _, top in rows)
    return (
        f"Of {len(rows)} reads with more than one source, {newest} give the largest weight to their newest source and "
        f"{embedding} to the embedding."
    )


def _layer_panels(models: Models) -> list[Panel]:
    """Draw bars of the two reads of one layer."""
    panels = []
    for name, result in found(models, "depth_weights"):
        columns = source_names(len(result["means"][0]))
        rows: Rows = []
        # The output site belongs to no layer.
        for index, means in enumerate(result["means"][:-1]):
            num_sources = len(known(means))
            kind = "before attention" if index % 2 == 0 else "before the MLP"
            rows += [
                {"layer": index // 2, "column": column, "kind": kind, "value": mean * num_sources}
                for column, mean in zip(columns, means, strict=True)
                if mean is not None
            ]
        if not rows:
            continue
        chart = bars(
            rows,
            x="source (embedding, blocks)",
            y="weight × sources (1 = uniform)",
            columns=columns,
            rule=(1.0, "uniform"),
            limit=max(row["value"] for row in rows),
            by_layer=True,
        )
        panels.append(Panel(titled(models, name, "Weights of its reads (AttnRes)"), chart))
    return panels


def _attention_entropies(result: StoredResult) -> list[float | None]:
    # The output site, the last one, belongs to no layer.
    entropies: list[float | None] = result["entropies"][:-1:2]
    return entropies


def _mlp_entropies(result: StoredResult) -> list[float | None]:
    entropies: list[float | None] = result["entropies"][1::2]
    return entropies


FIGURE = Figure(
    place=10,
    title="What each site reads (AttnRes)",
    how=(
        "Every sublayer reads a weighted sum of sources: the embedding and the sums of blocks of sublayers. Rows are "
        "reads, columns are sources. The value is the mean weight times the number of sources of the read, so 1 is a "
        "uniform weight. All rows share one colour scale."
    ),
    limits=(
        "A weight does not measure importance: a source with a large weight may have no effect, and one with a small "
        "weight may be needed. The figures that drop sources measure the effect. Reads with a single source are not "
        "shown."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(
        LayerLine(100, "entropy of the read before attention", "depth_weights", _attention_entropies),
        LayerLine(110, "entropy of the read before the MLP", "depth_weights", _mlp_entropies),
    ),
    layer_panels=_layer_panels,
)
