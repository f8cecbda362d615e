"""Figure of gradient norms of layers and sublayer outputs."""

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
    """Compare the largest and the smallest gradient."""
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
    title="Gradient norms",
    how=(
        "Norm of the gradient of the loss with respect to the parameters of a layer, and to the output of a sublayer. "
        "A flat profile means that all layers receive similar gradients."
    ),
    limits=(
        "These are gradients of the given model on this text, not those during training. The norms depend on batch "
        "size and window length."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(LayerLine(90, "gradient norm of its parameters", _METRIC, field_values("layer_parameters")),),
)
