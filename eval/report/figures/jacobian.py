"""Figure of the distance of each layer's Jacobian from the identity."""

from __future__ import annotations

from ..figure import Figure, LayerLine, Models, Panel
from ..rows import curve_panels, found, per_layer
from ..sentences import argmax, field_values, known, no_number, number


def _panels(models: Models) -> list[Panel]:
    y = "‖J − I‖ / D"
    gaps = per_layer(models, "jacobian_gap", "jacobian_identity_gap")
    mean_gaps = per_layer(models, "jacobian_gap", "mean_jacobian_identity_gap")
    return [
        *curve_panels(models, "Gap per sequence", gaps, y, zero=True),
        *curve_panels(models, "Gap of the mean Jacobian", mean_gaps, y, zero=True),
    ]


def _findings(models: Models) -> list[str]:
    """Name the largest estimate and the error of the estimates."""
    said = []
    for name, result in found(models, "jacobian_gap"):
        gaps, errors = result["jacobian_identity_gap"], known(result["relative_errors"])
        top = argmax(gaps)
        if top is None:
            said.append(no_number(name))
            continue
        error = f"; relative standard error at most {max(errors):.1%}" if errors else ""
        said.append(
            f"{name}: largest gap {number(gaps[top])} at layer {top}{error} "
            f"({result['num_probes']} random vectors per batch, seed {result['seed']})."
        )
    return said


FIGURE = Figure(
    place=150,
    title="How close each layer is to the identity (Jacobian gap)",
    how=(
        "Distance of a layer's Jacobian from the identity; at 0 the layer passes small changes of its input on "
        "unchanged. Left: per sequence, over all tokens. Right: averaged over tokens first, as in the released code "
        "of the paper."
    ),
    limits=(
        "Both are estimates from random vectors. They are different quantities, and either can be the larger one. The "
        "convention for AttnRes is specific to this project."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(LayerLine(120, "Jacobian gap", "jacobian_gap", field_values("jacobian_identity_gap")),),
)
