"""What each figure says in this report, in sentences made from the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .panels import Parts, found
from .panels_depth import weight_cells


def depth_weights(parts: Parts) -> list[str]:
    """The furthest from uniform."""
    said = []
    for name, result in found(parts, "depth_weights"):
        cells = weight_cells(result)
        furthest = max(cells, key=lambda row: abs(row["value"] - 1), default=None)
        if furthest is None:
            said.append(_no_number(name))
            continue
        if abs(furthest["value"] - 1) < 1e-4:
            said.append(f"{name}: every read is uniform; the queries have not been trained.")
            continue
        own = _newest_favoured(result)
        said.append(
            f"{name}: furthest from uniform is {furthest['line']} on source {furthest['column']}, with "
            f"{furthest['value']:.2f} times the uniform weight. {own} The largest standard deviation over tokens is "
            f"{max(row['deviation'] for row in cells):.3f}; at 0 the reads would not look at the token."
        )
    return said


def _newest_favoured(result: dict[str, Any]) -> str:
    rows = [
        (means, top) for means, top in zip(result["means"], result["argmax"], strict=True) if len(_known(means)) > 1
    ]
    newest = sum(top == max(i for i, mean in enumerate(means) if mean is not None) for means, top in rows)
    embedding = sum(top == 0 for _, top in rows)
    return (
        f"Of {len(rows)} reads with a choice, {newest} weigh their newest source most and {embedding} the embedding."
    )


def source_drop(parts: Parts) -> list[str]:
    """The drop against the spread of its controls."""
    said = []
    for name, result in found(parts, "source_drop_old"):
        controls = _known(result["control_increases"])
        values = ", ".join(f"{value:+.3f}" for value in controls)
        sentence = (
            f"{name}: without the sources that are at least two older than the newest, the loss changes by "
            f"{_signed(result['increase'])} nats; {len(controls)} random drops of as many sources at the same sites "
            f"give {_signed(result['control_mean'])} (std {_number(result['control_std'])}; {values})."
        )
        if controls and result["increase"] is not None:
            inside = min(controls) <= result["increase"] <= max(controls)
            place = "within" if inside else "below" if result["increase"] < min(controls) else "above"
            sentence += f" That is {place} the range of the controls."
        said.append(sentence)
    return said


def source_drop_matrix(parts: Parts) -> list[str]:
    """Whether weight and effect agree."""
    said = []
    weights = dict(found(parts, "depth_weights"))
    for name, result in found(parts, "source_drop_matrix"):
        agree = total = 0
        for row, means in zip(result["increases"], weights[name]["means"] if name in weights else [], strict=False):
            if len(_known(row)) > 1:
                total += 1
                agree += _argmax(row) == _argmax(means)
        if total:
            said.append(
                f"{name}: at {agree} of {total} sites the source with the largest weight is also the one whose drop "
                "costs most."
            )
    return said


def depth_weight_sites(parts: Parts) -> list[str]:
    """The least even read."""
    said = []
    for name, result in found(parts, "depth_weights"):
        known = [
            (value, site)
            for value, site in zip(result["entropies"], result["sites"], strict=True)
            if value is not None
        ]
        # Untrained reads are all even, up to rounding.
        if known and min(known)[0] > 1 - 1e-6:
            said.append(f"{name}: all reads are even.")
        elif known:
            mean = sum(value for value, _ in known) / len(known)
            said.append(
                f"{name}: mean entropy {mean:.3f} of at most 1; the least even read is {min(known)[1]} with "
                f"{min(known)[0]:.3f}."
            )
    return said


def slot_mass(parts: Parts) -> list[str]:
    """Totals beside a uniform attention."""
    said = []
    for name, result in found(parts, "slot_mass"):
        totals = _known(mass for layer in result["totals"] for mass in layer)
        uniform = _known(result["uniform"])
        if not totals:
            # A single layer has no slots to read.
            said += [_no_number(name)] if result["slots"] else []
            continue
        sentence = (
            f"{name}: mean mass on depth slots {sum(totals) / len(totals):+.4f}; an attention that weighs all keys "
            f"alike would have {sum(uniform) / len(uniform):.3f}."
        )
        if result["gated"]:
            sentence += (
                " The mass includes the gate of each head: a closed gate shows 0, a negative one a negative mass."
            )
        said.append(sentence)
    return said


def slot_drop(parts: Parts) -> list[str]:
    """The slot that is missed most."""
    said = []
    for name, result in found(parts, "slot_drop"):
        known = [
            (value, slot) for value, slot in zip(result["by_slot"], result["slots"], strict=True) if value is not None
        ]
        if known:
            said.append(f"{name}: the slot missed most is {max(known)[1]}, {_signed(max(known)[0])} nats.")
    return said


def usefulness(parts: Parts) -> list[str]:
    """U with the size of the fit."""
    said = []
    for level in ("layer", "sublayer"):
        for name, result in found(parts, f"usefulness_{level}"):
            if result["score"] is None:
                said.append(_no_number(f"{name}, {level}s"))
                continue
            count = sum(result["is_useful"])
            sentence = (
                f"{name}: {count} of {len(result['is_useful'])} {level}s are useful (U = {result['score']:.2f}), "
                f"fitted on {result['num_fit_tokens']} tokens with {result['num_unknowns']} unknowns per channel."
            )
            if result["num_fit_tokens"] < 2 * result["num_unknowns"]:
                sentence += (
                    " So few tokens leave the fit to its regulariser, and U says little: give a longer --text or more "
                    "--num-sequences."
                )
            said.append(sentence)
    return said


def causal(parts: Parts) -> list[str]:
    """The layer that matters most, and the conventions."""
    said = []
    for name, result in found(parts, "causal_scores"):
        losses = result["loss_increase"]
        worst, least = _argmax(losses), _argmin(losses)
        if worst is None or least is None:
            said.append(_no_number(name))
            continue
        said.append(
            f"{name}: mean score {_number(result['mean'])}. Skipping layer {worst} costs most "
            f"({_signed(losses[worst])} nats), layer {least} least ({_signed(losses[least])}). Conventions: slots = "
            f"{result['slots']}, mix = {result['mix']} (they matter for MoDA and AttnRes alone)."
        )
    return said


def permutation(parts: Parts) -> list[str]:
    """Means, with inner and edge pairs apart."""
    said = []
    for name, result in found(parts, "permutation_adjacent"):
        said.append(
            f"{name}: swapping neighbours changes the loss by {_percent(result['mean'])} on average; pairs without "
            f"the first and last layer {_percent(result['inner_mean'])}, pairs with them "
            f"{_percent(result['edge_mean'])}."
        )
        if result["num_unfit_pairs"]:
            said.append(f"{name}: {result['num_unfit_pairs']} pairs do not fit each other and were left out.")
    return said


def logit_lens(parts: Parts) -> list[str]:
    """Where the final prediction is half there."""
    said = []
    for name, result in found(parts, "logit_lens"):
        overlap = result["top5_overlap"]
        if not _known(overlap):
            said.append(_no_number(name))
            continue
        state = first_state_with(overlap, 0.5)
        said.append(
            f"{name}: state {state} of {len(overlap) - 1} is the first whose five likeliest tokens share half with "
            f"the final ones; loss there {_number(result['cross_entropy'][state])}, at the end "
            f"{_number(result['cross_entropy'][-1])} nats."
        )
    return said


def first_state_with(values: list[float | None], least: float) -> int:
    """The first state with at least this value; the last one has it always."""
    return next((i for i, value in enumerate(values) if value is not None and value >= least), len(values) - 1)


def contribution(parts: Parts) -> list[str]:
    """Largest update, and who erases."""
    said = []
    for name, result in found(parts, "relative_contribution"):
        top = _argmax(result["layers"])
        if top is None:
            said.append(_no_number(name))
            continue
        erasing = [str(i) for i, cosine in enumerate(result["layer_cosines"]) if cosine is not None and cosine < 0]
        who = f"layers {', '.join(erasing)}" if erasing else "no layer"
        said.append(
            f"{name}: layer {top} changes the state most ({_number(result['layers'][top])} times its norm); on "
            f"average {who} {'work' if erasing else 'works'} against the direction of the state."
        )
    return said


def magnitude(parts: Parts) -> list[str]:
    """Growth from the first to the last state."""
    said = []
    for name, result in found(parts, "output_magnitude"):
        first, last = result["states"][0], result["states"][-1]
        if first and last:
            said.append(f"{name}: from the first to the last state the size grows by a factor of {last / first:.1f}.")
    return said


def similarity(parts: Parts) -> list[str]:
    """Largest and smallest turn."""
    said = []
    for name, result in found(parts, "angular_distance"):
        adjacent = result["adjacent"]
        top, low = _argmax(adjacent), _argmin(adjacent)
        if top is None or low is None:
            said.append(_no_number(name))
            continue
        said.append(
            f"{name}: layer {top} turns the state most ({_number(adjacent[top])} of π), layer {low} least "
            f"({_number(adjacent[low])})."
        )
    return said


def gradient(parts: Parts) -> list[str]:
    """How even the gradients are."""
    said = []
    for name, result in found(parts, "gradient_magnitude"):
        norms = _known(result["layer_parameters"])
        if norms and min(norms) > 0:
            said.append(
                f"{name}: the largest gradient of a layer is {max(norms) / min(norms):.1f} times the smallest (layer "
                f"{_argmax(result['layer_parameters'])})."
            )
    return said


def jacobian(parts: Parts) -> list[str]:
    """Estimates and their errors."""
    said = []
    for name, result in found(parts, "jacobian_gap"):
        gaps, errors = result["jacobian_identity_gap"], _known(result["relative_errors"])
        top = _argmax(gaps)
        if top is None:
            said.append(_no_number(name))
            continue
        error = f"; relative standard error at most {max(errors):.1%}" if errors else ""
        said.append(
            f"{name}: largest gap {_number(gaps[top])} at layer {top}{error} "
            f"({result['num_probes']} random vectors per batch, seed {result['seed']})."
        )
    return said


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _argmax(values: list[float | None]) -> int | None:
    return max((i for i, value in enumerate(values) if value is not None), key=values.__getitem__, default=None)


def _argmin(values: list[float | None]) -> int | None:
    return min((i for i, value in enumerate(values) if value is not None), key=values.__getitem__, default=None)


def _no_number(name: str) -> str:
    return f"{name}: no number here: the model gives NaN or infinite values."


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:+.3g}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
