"""How close a layer is to doing nothing: distance of its Jacobian from the identity."""

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
    """The largest estimate, and the error of the estimates."""
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
    title="How close a layer is to doing nothing (Jacobian gap)",
    how=(
        "Distance of a layer's derivative from the identity; at 0 the layer passes small changes of its input through "
        "unchanged. Left, per sequence with all tokens; right, averaged over tokens first, as in the released code of "
        "the paper."
    ),
    limits=(
        "Both are estimates from random vectors. The two are different quantities, and neither is always the smaller. "
        "The convention for AttnRes is this project's own."
    ),
    panels=_panels,
    findings=_findings,
    layer_lines=(LayerLine(120, "Jacobian gap", "jacobian_gap", field_values("jacobian_identity_gap")),),
)
