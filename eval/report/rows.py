"""Turn results of metrics into rows of charts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .charts import Rows, curve
from .figure import Models, Panel
from .result import StoredResult

_KINDS = {"attn": "attention", "mlp": "MLP", "mixer": "mixer"}


def found(models: Models, metric: str) -> Iterator[tuple[str, StoredResult]]:
    """Yield name and result of every model for which a metric was measured."""
    for model in models:
        if metric in model.metrics:
            yield model.name, model.metrics[metric]


def titled(models: Models, name: str, title: str) -> str:
    """Return the title of a panel for one model; it contains the model's name if the report has two models.

    Args:
        models: the models of the report.
        name: name of the model.
        title: title of the panel.
    """
    return f"{title} · {name}" if len(models) > 1 else title


def names_of(models: Models) -> list[str]:
    """Return the names of the models."""
    return [model.name for model in models]


def numbers(count: int) -> list[str]:
    """Return names of layers or states: "0", "1", ..."""
    return [str(number) for number in range(count)]


def source_names(count: int) -> list[str]:
    """Return names of AttnRes sources: the embedding, then numbered blocks."""
    return ["emb.", *(str(number) for number in range(1, count))]


def per_layer(models: Models, metric: str, field: str, *, where: str = "layer {}") -> Rows:
    """Return rows of a curve from a list with one value per layer.

    Args:
        models: the models of the report.
        metric: name of the metric; models without it have no rows.
        field: field of its result with the list.
        where: label of a point, with `{}` for the layer.
    """
    return [
        {"at": index, "where": where.format(index), "value": value, "model": name, "kind": ""}
        for name, result in found(models, metric)
        for index, value in enumerate(result[field])
    ]


def per_sublayer(models: Models, metric: str, field: str, names: str = "sublayer_names") -> Rows:
    """Return rows of a curve from a list with one value per sublayer; attention and MLP are separate kinds.

    Args:
        models: the models of the report.
        metric: name of the metric; models without it have no rows.
        field: field of its result with the list.
        names: field of its result with the names of the sublayers, e.g. `"attn 0"`.
    """
    rows = []
    for model, result in found(models, metric):
        for name, value in zip(result[names], result[field], strict=True):
            kind, layer = name.split()
            rows.append({"at": int(layer), "where": name, "value": value, "model": model, "kind": _KINDS[kind]})
    return rows


def matrix_rows(matrix: list[list[float | None]], lines: Sequence[str], columns: Sequence[str]) -> Rows:
    """Return rows of a heat map from a matrix.

    Args:
        matrix: the values; `None` is left blank.
        lines: names of the lines of the matrix.
        columns: names of its columns.
    """
    return [
        {"line": line, "column": column, "value": value}
        for line, row in zip(lines, matrix, strict=True)
        for column, value in zip(columns, row, strict=True)
        if value is not None
    ]


def largest(rows: Rows) -> float:
    """Return the largest value, or 0 if there is none."""
    return max((row["value"] for row in rows if row["value"] is not None), default=0.0)


def curve_panels(
    models: Models,
    title: str,
    rows: Rows,
    y: str,
    *,
    x: str = "layer",
    log: bool = False,
    zero: bool = False,
    rule: tuple[float, str] | None = None,
) -> list[Panel]:
    """Return a panel with a curve, or no panel if there are no values.

    Args:
        models: the models of the report.
        title: title of the panel.
        rows: as in `charts.curve`.
        y: title of the vertical axis.
        x: title of the horizontal axis.
        log, zero, rule: as in `charts.curve`.
    """
    known = [row for row in rows if row["value"] is not None]
    if not known:
        return []
    return [Panel(title, curve(known, x=x, y=y, models=names_of(models), log=log, zero=zero, rule=rule))]
