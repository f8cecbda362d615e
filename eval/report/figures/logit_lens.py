"""Figure of the logit lens: predictions read from every state."""

from __future__ import annotations

from ..charts import Rows
from ..figure import Figure, LayerLine, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import curve_panels, found, per_layer
from ..sentences import known, no_number, number


def _panels(models: Models) -> list[Panel]:
    def rows(field: str) -> Rows:
        return per_layer(models, "logit_lens", field, where="state {}")

    x = "state before layer"
    return [
        *curve_panels(models, "Loss read from each state", rows("cross_entropy"), "loss (nats)", x=x),
        *curve_panels(models, "Distance to the final prediction", rows("kl"), "KL (nats)", x=x, zero=True),
        *curve_panels(models, "Overlap with the final top 5", rows("top5_overlap"), "top-5 overlap", x=x, zero=True),
    ]


def _findings(models: Models) -> list[str]:
    """Name the first state that shares half of the final top-5 tokens."""
    said = []
    for name, result in found(models, "logit_lens"):
        overlap = result["top5_overlap"]
        if not known(overlap):
            said.append(no_number(name))
            continue
        state = _first_half_right(overlap)
        said.append(
            f"{name}: state {state} of {len(overlap) - 1} is the first that shares half of its top-5 tokens with the "
            f"final prediction; the loss is {number(result['cross_entropy'][state])} nats there and "
            f"{number(result['cross_entropy'][-1])} nats at the end."
        )
    return said


def _first_half_right(overlap: list[float | None]) -> int:
    """Return the first state with half of the final top-5 tokens."""
    return next((i for i, value in enumerate(overlap) if value is not None and value >= 0.5), len(overlap) - 1)


def _loss(result: StoredResult) -> str | None:
    loss = result["cross_entropy"][-1]
    return None if loss is None else f"{loss:.4f}"


def _depth_of_prediction(result: StoredResult) -> str | None:
    overlap = result["top5_overlap"]
    if overlap[-1] is None:
        return None
    state, last = _first_half_right(overlap), len(overlap) - 1
    return f"{state / last:.2f} (state {state} of {last})"


FIGURE = Figure(
    place=100,
    title="Where the prediction forms (logit lens)",
    how=(
        "The final norm and the head are applied to every state, as if the model ended there. The leftmost state is "
        "the embedding, the rightmost the model's own prediction."
    ),
    limits=(
        "The head is not trained to read intermediate states: a high loss does not mean that the information is "
        "missing. With AttnRes, the state is what the layer's attention site reads."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            10,
            "loss (nats per token)",
            "Loss of the model on this text; only comparable between models with the same tokens.",
            "logit_lens",
            _loss,
        ),
        SummaryLine(
            70,
            "depth of the prediction",
            "First state, as a fraction of all, that shares half of its top-5 tokens with the final prediction.",
            "logit_lens",
            _depth_of_prediction,
        ),
    ),
    layer_lines=(
        LayerLine(
            40,
            "logit lens: loss before the layer (nats)",
            "logit_lens",
            lambda result: result["cross_entropy"][:-1],
        ),
        LayerLine(
            50, "logit lens: overlap with the final top 5", "logit_lens", lambda result: result["top5_overlap"][:-1]
        ),
    ),
)
