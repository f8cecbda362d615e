"""Comparison of two checkpoints: tolerances, rows and report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...utils.text_table import table


class Tolerance(NamedTuple):
    """Largest allowed relative difference of logits (relative to the largest logit) and of perplexity."""

    logits: float
    perplexity: float


#: The models sum the same terms in a different order and differ only by rounding. In half precision the host rounds
#: the residual stream after every sublayer, while the retrofitted model sums in float32 and rounds at every read. The
#: limits are 16 unit roundoffs (2^-8, 2^-11) for logits and 2 for perplexity; the largest measured for 5 to 80 layers
#: were 8.2 (0.032 in bfloat16) and 0.5.
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
    """Result of `verify`.

    Attributes:
        source: the stock checkpoint.
        output_dir: the retrofitted checkpoint.
        dtype: dtype in which both models ran.
        comparisons: the rows of the report.
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
        """Return the report as JSON values."""
        rows = [asdict(row) | {"ok": row.ok} for row in self.comparisons]
        for row in rows:
            # JSON has no NaN or infinity.
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
    """Outputs of one model.

    Attributes:
        outputs: logits of the windows, `[N, T, vocabulary]`; the model's first output if it has no language-modelling
            head.
        greedy_tokens: continuations of the prompts; empty without a language-modelling head.
        greedy_logits: logits of the tokens of each continuation, `[tokens, vocabulary]`.
        perplexity: perplexity on `num_perplexity_tokens` tokens, if measured.
    """

    outputs: list[Tensor]
    greedy_tokens: list[list[int]]
    greedy_logits: list[Tensor]
    perplexity: float | None = None
    num_perplexity_tokens: int = 0


def compare(host: Measured, depth: Measured, dtype: str) -> list[Comparison]:
    """Return the rows of the report.

    Args:
        host: outputs of the source.
        depth: outputs of the retrofitted checkpoint.
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
        # In half precision, near ties may be resolved differently; in float32 the texts must be equal.
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
    """Return the relative difference; any difference from a model whose logits are all zero is infinite."""
    if scale == 0:
        return math.inf if difference else 0.0
    return difference / scale


def _compare_greedy(host: Measured, depth: Measured, near_tie: float) -> Comparison:
    """Compare greedy texts; count the tokens after a divergence that is not a near tie in the source's logits."""
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
