"""Figure of the depth-mixing matrix, as heat maps."""

from __future__ import annotations

from ..charts import Rows, heat_map
from ..figure import Figure, Models, Panel, SummaryLine
from ..result import StoredResult
from ..rows import found, matrix_rows, titled
from ..sentences import no_number, number

# Smallest half-width of the colour scale, so that a matrix of ones looks uniform.
_LEAST_SPREAD = 0.1
# Factors further from 1 have the colour at the end of the scale, so that one of them does not hide all others.
_LARGEST_SPREAD = 2.0


def _panels(models: Models) -> list[Panel]:
    """Draw the means over tokens on one colour scale, and the variance over tokens in the tooltip."""
    cells = {name: _cells(result) for name, result in found(models, "depth_mixing")}
    spread = max((abs(row["value"] - 1) for rows in cells.values() for row in rows), default=0.0)
    spread = min(max(spread, _LEAST_SPREAD), _LARGEST_SPREAD)
    panels = []
    for name, result in found(models, "depth_mixing"):
        if not cells[name]:
            continue
        chart = heat_map(
            cells[name],
            x="source (embedding, outputs of sublayers)",
            y="site",
            value="factor (1 = residual sum)",
            columns=result["sources"],
            lines=result["sites"],
            domain=(1 - spread, 1 + spread),
            middle=1.0,
            more=(("deviation", "std over tokens"),),
        )
        panels.append(Panel(titled(models, name, "Depth-mixing matrix, mean over tokens"), chart))
    return panels


def _cells(result: StoredResult) -> Rows:
    rows = matrix_rows(result["means"], result["sites"], result["sources"])
    variances = matrix_rows(result["variances"], result["sites"], result["sources"])
    return [{**row, "deviation": other["value"] ** 0.5} for row, other in zip(rows, variances, strict=True)]


def _findings(models: Models) -> list[str]:
    """Give the ranks, and the factor that is furthest from 1."""
    said = []
    for name, result in found(models, "depth_mixing"):
        cells = _cells(result)
        if not cells:
            said.append(no_number(name))
            continue
        furthest = max(cells, key=lambda row: abs(row["value"] - 1))
        factor = (
            "every factor is 1, as in a residual model."
            if abs(furthest["value"] - 1) < 1e-4
            else f"the factor furthest from 1 is that of {furthest['column']} at {furthest['line']}, "
            f"{number(furthest['value'])}. The largest standard deviation over tokens is "
            f"{number(max(row['deviation'] for row in cells))}; 0 would mean that factors do not depend on the token."
        )
        said.append(f"{name}: semiseparable rank {_rank(result)} of at most {_most(result)}; {factor}")
    return said


def _most(result: StoredResult) -> int:
    """Return the largest rank that a block [k:, :k + 1] of the matrix can have."""
    number_of_sites = len(result["sites"])
    return (number_of_sites + 1) // 2


def _rank(result: StoredResult) -> str:
    least, most = result["least_semiseparable_rank"], result["semiseparable_rank"]
    return str(most) if least == most else f"{least} to {most}"


FIGURE = Figure(
    place=45,
    title="What sublayers read (depth-mixing matrix)",
    how=(
        "Row by row, the factors with which the embedding and the outputs of earlier sublayers enter the input of a "
        "sublayer. In a residual model every factor is 1. The semiseparable rank is the number of tensors that would "
        "have to be carried from sublayer to sublayer to compute the same inputs: 1 for a residual stream, n for n "
        "streams, more for reads of many sources."
    ),
    limits=(
        "Factors that depend on the token are taken as they are for that token. A factor does not measure importance: "
        "outputs of sublayers differ in size, and sublayers normalise their inputs. Exact ranks say nothing about "
        "small factors; the effective rank does."
    ),
    panels=_panels,
    findings=_findings,
    summary=(
        SummaryLine(
            115,
            "semiseparable rank",
            "Number of tensors that carry everything from sublayer to sublayer; 1 in a residual model.",
            "depth_mixing",
            _rank,
        ),
        SummaryLine(
            120,
            "effective rank of the depth-mixing matrix",
            "Exp of the entropy of its singular values; low if few directions of the matrix dominate.",
            "depth_mixing",
            lambda result: None if result["effective_rank"] is None else f"{result['effective_rank']:.2f}",
        ),
    ),
)
