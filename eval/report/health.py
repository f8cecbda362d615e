"""Findings about NaN and infinite values of a model: where they are, and where they start."""

from __future__ import annotations

from .result import MeasuredModel


def has_no_loss(model: MeasuredModel) -> bool:
    """Return whether the loss of a measured model on the text is NaN or infinite."""
    lens = model.metrics.get("logit_lens")
    return lens is not None and lens["cross_entropy"][-1] is None


def health_findings(model: MeasuredModel) -> list[str]:
    """Return sentences about NaN and infinite values of a model, if it has any."""
    said = []
    broken = model.info.non_finite_parameters
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        said.append(f"parameters with NaN or infinite values: {broken[0]}{more}.")
    if has_no_loss(model):
        sentence = "the loss on this text is NaN or infinite"
        states = model.metrics.get("output_magnitude", {}).get("states", [])
        first = next((index for index, size in enumerate(states) if size is None), None)
        if first is not None:
            place = "the embeddings" if first == 0 else f"layer {first - 1}"
            sentence += f"; so are the states from {place} on"
        sentence += ". Affected numbers are omitted or shown as NaN."
        if not broken and model.settings.dtype == "float16":
            sentence += " The largest float16 value is 65,504: try bfloat16 or float32."
        said.append(sentence)
    return said
