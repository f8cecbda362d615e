"""When is the prediction ready: what the model would predict from every state."""

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
        *curve_panels(models, "Share of the final top five", rows("top5_overlap"), "top-5 overlap", x=x, zero=True),
    ]


def _findings(models: Models) -> list[str]:
    """Where the final prediction is half there."""
    said = []
    for name, result in found(models, "logit_lens"):
        overlap = result["top5_overlap"]
        if not known(overlap):
            said.append(no_number(name))
            continue
        state = _first_half_right(overlap)
        said.append(
            f"{name}: state {state} of {len(overlap) - 1} is the first whose five likeliest tokens share half with "
            f"the final ones; loss there {number(result['cross_entropy'][state])}, at the end "
            f"{number(result['cross_entropy'][-1])} nats."
        )
    return said


def _first_half_right(overlap: list[float | None]) -> int:
    """The first state with half of the final top five; the last state has all of them."""
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
    title="When is the prediction ready? (logit lens)",
    how=(
        "The final norm and the head read every state as if the model ended there. The left end is the embedding, the "
        "right end the model itself."
    ),
    limits=(
        "Early states need not be written in the language of the head: a poor reading does not mean that the "
        "information is missing. With AttnRes the state is the mix that the layer reads."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            10,
            "loss (nats per token)",
            "Of the model on this text. Comparable between models with the same tokens only.",
            "logit_lens",
            _loss,
        ),
        SummaryLine(
            70,
            "depth of the prediction",
            "First state, relative to all, whose five likeliest tokens share half with the final ones.",
            "logit_lens",
            _depth_of_prediction,
        ),
    ),
    layer_lines=(
        LayerLine(
            40,
            "logit lens: loss read before the layer (nats)",
            "logit_lens",
            lambda result: result["cross_entropy"][:-1],
        ),
        LayerLine(
            50, "logit lens: share of the final top five", "logit_lens", lambda result: result["top5_overlap"][:-1]
        ),
    ),
)
