"""Figure of the loss without old AttnRes sources, compared with random drops of the same number."""

from __future__ import annotations

from ..charts import Rows, drop_beside_controls
from ..figure import Figure, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import found, titled
from ..sentences import known, number, signed


def _panels(models: Models) -> list[Panel]:
    rows: Rows = []
    for name, result in found(models, "source_drop_old"):
        rows.append({"line": name, "value": result["increase"], "kind": "measured"})
        rows += [{"line": name, "value": v, "kind": "random control"} for v in result["control_increases"]]
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return []
    names = list(dict.fromkeys(row["line"] for row in rows))
    title = "Old sources dropped at all sites"
    chart = drop_beside_controls(rows, x="loss increase (nats)")
    return [Panel(titled(models, names[0], title) if len(names) == 1 else title, chart)]


def _findings(models: Models) -> list[str]:
    """Compare the drop with the range of its controls."""
    said = []
    for name, result in found(models, "source_drop_old"):
        controls = known(result["control_increases"])
        values = ", ".join(f"{value:+.3f}" for value in controls)
        sentence = (
            f"{name}: without sources that are at least two older than the newest, the loss changes by "
            f"{signed(result['increase'])} nats; {len(controls)} random drops of as many sources at the same sites "
            f"change it by {signed(result['control_mean'])} (std {number(result['control_std'])}; {values})."
        )
        if controls and result["increase"] is not None:
            inside = min(controls) <= result["increase"] <= max(controls)
            place = "within" if inside else "below" if result["increase"] < min(controls) else "above"
            sentence += f" That is {place} the range of the controls."
        said.append(sentence)
    return said


def _drop(result: StoredResult) -> str | None:
    if result["increase"] is None or result["control_mean"] is None:
        return None
    spread = "" if result["control_std"] is None else f" ± {result['control_std']:.3f}"
    return f"{result['increase']:+.3f} (random {result['control_mean']:+.3f}{spread})"


FIGURE = Figure(
    place=20,
    title="Loss without old sources (AttnRes)",
    how=(
        "All reads drop the sources that are at least two older than their newest one; the other weights are "
        "renormalised. The random controls drop as many sources at the same sites, chosen at random. If the measured "
        "point lies among the controls, old sources are no more important than others."
    ),
    limits=(
        "The controls are few and vary widely: compare with their whole range, not with their mean. The model was not "
        "trained with dropped sources, so a large increase also reflects its fragility."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            100,
            "old sources dropped (nats)",
            "Change of the loss without old sources, compared with random drops of as many (± their std).",
            "source_drop_old",
            _drop,
        ),
    ),
)
