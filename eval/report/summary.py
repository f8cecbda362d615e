"""Summary table at the top of the page: a few numbers per model with their meaning."""

from __future__ import annotations

from dataclasses import dataclass

from .figure import Models, SummaryLine
from .figure_registry import FIGURES
from .health import has_no_loss
from .result import MeasuredModel


@dataclass(frozen=True)
class SummaryRow:
    """One line of the summary.

    Attributes:
        title: name of the number.
        values: one text per model.
        meaning: one sentence on how to read it.
    """

    title: str
    values: tuple[str, ...]
    meaning: str


def summary_rows(models: Models) -> list[SummaryRow]:
    """Return the shapes of the models, then the lines of figures for which at least one model has a number."""
    rows = _shapes(models)
    lines = sorted((line for figure in FIGURES.values() for line in figure.summary), key=lambda line: line.place)
    for line in lines:
        values = [_text(line, model) for model in models]
        if any(value is not None for value in values):
            texts = tuple("–" if value is None else value for value in values)
            rows.append(SummaryRow(line.title, texts, line.meaning))
    return rows


def _shapes(models: Models) -> list[SummaryRow]:
    infos = [model.info for model in models]
    return [
        SummaryRow(
            "family",
            tuple(info.family for info in infos),
            "How layers are connected; determines the conventions.",
        ),
        SummaryRow(
            "layers × width",
            tuple(f"{info.num_layers} × {info.hidden_size}" for info in infos),
            "Compare models of the same shape; every number below depends on the depth.",
        ),
        SummaryRow(
            "query / key-value heads",
            tuple(f"{info.num_attention_heads} / {info.num_key_value_heads}" for info in infos),
            "Usefulness depends on this ratio, and on weight decay, which a checkpoint does not record.",
        ),
    ]


def _text(line: SummaryLine, model: MeasuredModel) -> str | None:
    if line.metric not in model.metrics:
        return None
    text = line.text_of(model.metrics[line.metric])
    # With a finite loss, a number is missing for another reason, e.g. no inner pair to swap.
    return "NaN" if text is None and has_no_loss(model) else text
