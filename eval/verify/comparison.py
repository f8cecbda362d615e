"""How two checkpoints compare: tolerances, the rows of a comparison, and the report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...utils.text_table import table


class Tolerance(NamedTuple):
    """Largest difference of the logits, relative to the largest logit, and of the perplexities, relative."""

    logits: float
    perplexity: float


#: The same terms are summed in another order, so what differs is rounding. float32: the project's limit. Half
#: precision: the host rounds its stream after every sublayer, the retrofit sums in float32 and rounds at every read,
#: so each strays from the exact result on its own. The limits are 16 unit roundoffs (2^-8, 2^-11) for logits and 2 for
#: perplexities; the largest seen in models of 5 to 80 layers was 8.2 (0.032 in bfloat16) and 0.5.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-6),
    "bfloat16": Tolerance(16 * 2**-8, 2 * 2**-8),
    "float16": Tolerance(16 * 2**-11, 2 * 2**-11),
}


@dataclass(frozen=True)
class Comparison:
    """One row of the report; `ok` when `difference <= tolerance`."""

    quantity: str
    source: str
    retrofit: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        # NaN is never ok.
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        source: the stock checkpoint.
        output_dir: the retrofitted one.
        dtype: in which both ran.
        comparisons: the rows.
    """

    source: str
    output_dir: str
    dtype: str
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """Whether every difference is within its tolerance."""
        return all(row.ok for row in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The report as a dictionary for JSON."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.comparisons]
        for row in rows:
            # JSON has no word for them.
            if not math.isfinite(row["difference"]):
                row["difference"] = None
        return asdict(self) | {"comparisons": rows, "ok": self.ok}

    def __str__(self) -> str:
        header = ("quantity", "source", "retrofit", "difference", "tolerance", "ok")
        rows = [
            (
                row.quantity,
                row.source,
                row.retrofit,
                f"{row.difference:.2g}",
                f"{row.tolerance:.2g}",
                "yes" if row.ok else "NO",
            )
            for row in self.comparisons
        ]
        verdict = "the checkpoints agree" if self.ok else "THE CHECKPOINTS DIFFER"
        return f"{table([header, *rows])}\n{verdict} ({self.dtype})"


@dataclass
class Measured:
    """What one model gave.

    Attributes:
        outputs: logits of the windows, `[N, T, vocabulary]` (without a head for text: the model's first output).
        greedy_tokens: continuations of the prompts; empty without a language-modelling head.
        greedy_logits: the logits that each continuation was chosen from, `[tokens, vocabulary]`.
        perplexity: on `num_perplexity_tokens` tokens, if it was measured.
    """

    outputs: list[Tensor]
    greedy_tokens: list[list[int]]
    greedy_logits: list[Tensor]
    perplexity: float | None = None
    num_perplexity_tokens: int = 0


def compare(host: Measured, depth: Measured, dtype: str) -> list[Comparison]:
    """The rows of the report.

    Args:
        host: measured on the source.
        depth: measured on the retrofitted checkpoint.
        dtype: a key of `TOLERANCES`.
    """
    tolerance = TOLERANCES[dtype]
    host_scale, depth_scale = (max(output.abs().max().item() for output in m.outputs) for m in (host, depth))
    num_tokens = sum(output.shape[:-1].numel() for output in host.outputs)
    pairs = zip(host.outputs, depth.outputs, strict=True)
    difference = max((ours.double() - theirs.double()).abs().max().item() for theirs, ours in pairs)
    rows = [
        Comparison(
            f"largest |logit| of {num_tokens} tokens" if host.greedy_tokens else "largest |output|",
            f"{host_scale:.5g}",
            f"{depth_scale:.5g}",
            _relative(difference, host_scale),
            tolerance.logits,
        )
    ]
    if host.greedy_tokens:
        # In half precision a near tie may fall either way; in float32 the text has to be the same.
        near_tie = 0.0 if dtype == "float32" else tolerance.logits * host_scale
        rows.append(_compare_greedy(host, depth, near_tie))
    if host.perplexity is not None and depth.perplexity is not None:
        rows.append(
            Comparison(
                f"perplexity of {host.num_perplexity_tokens} tokens",
                f"{host.perplexity:.5g}",
                f"{depth.perplexity:.5g}",
                _relative(abs(depth.perplexity - host.perplexity), host.perplexity),
                tolerance.perplexity,
            )
        )
    return rows


def _relative(difference: float, scale: float) -> float:
    """Of a model whose logits are all zero, every difference is infinite."""
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale


def _compare_greedy(host: Measured, depth: Measured, near_tie: float) -> Comparison:
    """Greedy texts; what counts are the tokens after a parting that was no near tie of the source's logits."""
    num_equal = num_different = 0
    for theirs, ours, logits in zip(host.greedy_tokens, depth.greedy_tokens, host.greedy_logits, strict=True):
        length = max(len(theirs), len(ours))
        parting = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        if parting is None:
            parting = min(len(theirs), len(ours))
            num_different += length - parting
        elif (logits[parting, theirs[parting]] - logits[parting, ours[parting]]).item() > near_tie or not near_tie:
            num_different += length - parting
        num_equal += parting
    num_tokens = sum(map(len, host.greedy_tokens))
    name = "greedy tokens (up to near ties)" if near_tie else "greedy tokens"
    return Comparison(name, f"{num_tokens}", f"{num_equal} equal", num_different, 0)
