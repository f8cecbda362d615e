"""The figures named in the registry of metrics, in the order of the page."""

from __future__ import annotations

from importlib import import_module

from ..metrics.registry import ROWS
from .figure import Figure


def _load(name: str) -> Figure:
    figure = import_module(f".figures.{name}", __package__).FIGURE
    if not isinstance(figure, Figure):
        raise TypeError(f"figures/{name}.py: FIGURE is a {type(figure).__name__}, not a Figure")
    return figure


#: Figures by name, which is also the name of the file and of the PNG.
FIGURES: dict[str, Figure] = dict(
    sorted(((name, _load(name)) for row in ROWS for name in row.figures), key=lambda item: item[1].place)
)
