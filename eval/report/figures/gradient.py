"""Where the loss pulls: gradient norms of layers and sublayer outputs."""

from __future__ import annotations

from ..figure import Figure, LayerLine, Models, Panel
from ..rows import curve_panels, found, per_layer, per_sublayer
from ..sentences import argmax, field_values, known

_METRIC = "gradient_magnitude"


def _panels(models: Models) -> list[Panel]:
    layers = per_layer(models, _METRIC, "layer_parameters")
    outputs = per_sublayer(models, _METRIC, "sublayer_outputs")
    depth = per_layer(models, _METRIC, "depth_parameters")
    return [
        *curve_panels(models, "Parameters of a layer", layers, "gradient norm", zero=True),
        *curve_panels(models, "Outputs of a sublayer", outputs, "gradient norm", zero=True),
        *curve_panels(models, "Depth parameters of a layer", depth, "gradient norm", zero=True),
    ]


def _findings(models: Models) -> list[str]:
    """How even the gradients are."""
    said = []
    for name, result in found(models, _METRIC):
        norms = known(result["layer_parameters"])
        if norms and min(norms) > 0:
            said.append(
                f"{name}: the largest gradient of a layer is {max(norms) / min(norms):.1f} times the smallest (layer "
                f"{argmax(result['layer_parameters'])})."
            )
    return said


FIGURE = Figure(
    place=140,
    title="Where the loss pulls (gradients)",
    how=(
        "Norm of the loss's gradient by the parameters of a layer, and by the output of a sublayer. An even profile "
        "means that all layers are asked to change alike."
    ),
    limits=(
        "This is the gradient of the finished model on this text, not of its training. The norms depend on the batch "
        "size and the window length."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(LayerLine(90, "gradient norm of its parameters", _METRIC, field_values("layer_parameters")),),
)
