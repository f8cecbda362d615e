"""Figure of relative contributions: sizes and directions of updates."""

from __future__ import annotations

from ..figure import Figure, LayerLine, Models, Panel
from ..rows import curve_panels, found, per_layer, per_sublayer
from ..sentences import argmax, field_values, no_number, number

_METRIC = "relative_contribution"


def _panels(models: Models) -> list[Panel]:
    neither = (0, "orthogonal to the state")
    return [
        *curve_panels(
            models,
            "Size of a layer's update",
            per_layer(models, _METRIC, "layers"),
            "‖update‖ / ‖state‖",
            zero=True,
        ),
        *curve_panels(
            models,
            "Direction of a layer's update",
            per_layer(models, _METRIC, "layer_cosines"),
            "cos(update, state)",
            rule=neither,
        ),
        *curve_panels(
            models,
            "Size of a sublayer's output",
            per_sublayer(models, _METRIC, "sublayers"),
            "‖output‖ / ‖input‖",
            zero=True,
        ),
        *curve_panels(
            models,
            "Direction of a sublayer's output",
            per_sublayer(models, _METRIC, "sublayer_cosines"),
            "cos(output, input)",
            rule=neither,
        ),
    ]


def _findings(models: Models) -> list[str]:
    """Name the largest update, and the layers that reduce the state."""
    said = []
    for name, result in found(models, _METRIC):
        top = argmax(result["layers"])
        if top is None:
            said.append(no_number(name))
            continue
        erasing = [str(i) for i, cosine in enumerate(result["layer_cosines"]) if cosine is not None and cosine < 0]
        who = f"layers {', '.join(erasing)}" if erasing else "no layer"
        said.append(
            f"{name}: layer {top} changes the state most ({number(result['layers'][top])} times its norm); on average "
            f"{who} {'point' if erasing else 'points'} against the direction of the state."
        )
    return said


FIGURE = Figure(
    place=110,
    title="How much each layer adds (relative contribution)",
    how=(
        "Norm of the update of a layer or sublayer relative to the state that it is added to, and cosine between the "
        "two: a positive cosine reinforces the state, a negative one reduces it."
    ),
    limits=(
        "Size does not measure importance. With AttnRes, the state is what a site reads, and a layer's update is the "
        "difference between two reads."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(
        LayerLine(60, "‖update‖ / ‖state‖", _METRIC, field_values("layers")),
        LayerLine(70, "cos(update, state)", _METRIC, field_values("layer_cosines")),
    ),
)
