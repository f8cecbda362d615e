"""Figure of the usefulness of layers and of sublayers."""

from __future__ import annotations

from ..figure import Figure, LayerLine, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import curve_panels, found, per_layer, per_sublayer
from ..sentences import field_values, no_number


def _panels(models: Models) -> list[Panel]:
    """Draw the loss ratios of layers and of sublayers with the threshold."""
    panels = []
    for level, rows in (
        ("layer", per_layer(models, "usefulness_layer", "ratios")),
        ("sublayer", per_sublayer(models, "usefulness_sublayer", "ratios", "names")),
    ):
        thresholds = [result["threshold"] for _, result in found(models, f"usefulness_{level}")]
        if rows:
            rule = (thresholds[0], f"useful above {thresholds[0]:g}")
            panels += curve_panels(
                models, f"An affine map replaces a {level}", rows, "loss with the map / loss", rule=rule
            )
    return panels


def _findings(models: Models) -> list[str]:
    """State U and the size of the fit."""
    said = []
    for level in ("layer", "sublayer"):
        for name, result in found(models, f"usefulness_{level}"):
            if result["score"] is None:
                said.append(no_number(f"{name}, {level}s"))
                continue
            count = sum(result["is_useful"])
            sentence = (
                f"{name}: {count} of {len(result['is_useful'])} {level}s are useful (U = {result['score']:.2f}), "
                f"fitted on {result['num_fit_tokens']} tokens with {result['num_unknowns']} unknowns per channel."
            )
            if result["num_fit_tokens"] < 2 * result["num_unknowns"]:
                sentence += (
                    " With so few tokens the regulariser dominates the fit, and U says little: use a longer --text or "
                    "more --num-sequences."
                )
            said.append(sentence)
    return said


def _score(result: StoredResult) -> str | None:
    if result["score"] is None:
        return None
    return f"{result['score']:.2f} ({sum(result['is_useful'])} of {len(result['is_useful'])})"


FIGURE = Figure(
    place=70,
    title="Can an affine map replace a layer? (usefulness U)",
    how=(
        "An affine map (a matrix and a bias) is fitted on every other window and replaces a layer or sublayer; the "
        "loss is measured on the other windows. Above the line at 1.1 the loss rises by more than 10 %, and the layer "
        "counts as useful. U is the fraction of useful layers or sublayers."
    ),
    limits=(
        "U of layers and U of sublayers are not comparable. U depends on the text, the window length, weight decay "
        "and the number of key-value heads, so compare models that agree in these. U only counts values above a "
        "threshold; look at the values too. With fewer fitted tokens than unknowns, the result is an artefact of the "
        "fit."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            20,
            "usefulness U, layers",
            "Fraction of layers that no affine map can replace; only for residual models.",
            "usefulness_layer",
            _score,
        ),
        SummaryLine(
            30,
            "usefulness U, sublayers",
            "The same for attention and MLP sublayers, for all families; not comparable with the line above.",
            "usefulness_sublayer",
            _score,
        ),
    ),
    layer_lines=(LayerLine(30, "loss with an affine map / loss", "usefulness_layer", field_values("ratios")),),
)
