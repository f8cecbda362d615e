"""Paired differences between two runs of `depthattn eval --perplexity`, document by document."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.result_files import to_json
from ..utils.text_table import table
from .paired_difference import paired_difference
from .perplexity_results import REPORT_FILE, DomainPerplexity, read_report

#: Settings that determine how much context a prediction sees.
_CONTEXT = ("window", "stride")


@dataclass(frozen=True, slots=True)
class DomainDifference:
    """Paired difference of one metric on one domain.

    Attributes:
        domain: name of the domain.
        metric: `"bits_per_byte"`, or `"nats_per_token"` if both runs have the same tokens.
        items: what is paired: `"documents"`, or `"pieces"` of about one window if the domain is a single document that
            both runs split in the same way.
        num_items: number of pairs.
        value_a: value of run A.
        value_b: value of run B.
        difference: B - A; lower is better.
        standard_error: standard error of the difference; NaN for a single item.
    """

    domain: str
    metric: str
    items: str
    num_items: int
    value_a: float
    value_b: float
    difference: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class PerplexityComparison:
    """Comparison of two perplexity runs.

    Attributes:
        run_a, run_b: result files of the runs.
        rows: differences on the domains that both runs have.
        mean: unweighted mean over the domains for each metric, if there are several domains. Its standard error treats
            the set of domains as fixed.
        only_in_one: domains that only one of the runs has.
        context: differences between the runs in `window` and `stride`.
    """

    run_a: str
    run_b: str
    rows: tuple[DomainDifference, ...]
    mean: tuple[DomainDifference, ...]
    only_in_one: tuple[str, ...]
    context: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; NaN and infinities become None."""
        values: dict[str, Any] = to_json(asdict(self))
        return values

    def __str__(self) -> str:
        cells = [["domain", "metric", "n", "A", "B", "B - A", "± stderr"]]
        for row in (*self.rows, *self.mean):
            stderr = "-" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}"
            numbers = [f"{row.value_a:.4f}", f"{row.value_b:.4f}", f"{row.difference:+.4f}", stderr]
            cells.append([row.domain, row.metric, f"{row.num_items} {row.items}", *numbers])
        lines = [f"A: {self.run_a}", f"B: {self.run_b}", "", table(cells)]
        if any(row.items == "pieces" for row in self.rows):
            lines += ["", "pieces: parts of one document, not independent; the standard error is a lower bound."]
        lines += [f"{what}." for what in self.context]
        if self.only_in_one:
            lines += ["", f"In one run only: {', '.join(self.only_in_one)}."]
        return "\n".join(lines)


def report_of(run: Path) -> Path | None:
    """Return the result file of a perplexity run, given the file or its folder; None if there is none."""
    if run.is_dir():
        return run / REPORT_FILE if (run / REPORT_FILE).is_file() else None
    return run if run.is_file() else None


def compare_perplexity(run_a: Path, run_b: Path) -> PerplexityComparison:
    """Compare two result files of `depthattn eval --perplexity`.

    Args:
        run_a: result file of the baseline.
        run_b: result file of the other run.

    Raises:
        UserError: if a file is not a result file or has no per-document losses, the runs share no domain, or the texts
            of a domain differ.
    """
    a, b = read_report(run_a), read_report(run_b)
    common = [name for name in a.domains if name in b.domains]
    if not common:
        raise UserError(f"{run_a}, {run_b}: no domain in common.")
    rows: list[DomainDifference] = []
    for name in common:
        rows += _domain_rows(name, a.domains[name], b.domains[name], run_a, run_b)
    settings = [(name, a.settings.get(name), b.settings.get(name)) for name in _CONTEXT]
    context = tuple(f"A has {name} {x}, B {y}" for name, x, y in settings if x != y)
    only_in_one = tuple(sorted(a.domains.keys() ^ b.domains.keys()))
    return PerplexityComparison(str(run_a), str(run_b), tuple(rows), tuple(_means(rows)), only_in_one, context)


def _domain_rows(
    name: str, a: DomainPerplexity, b: DomainPerplexity, run_a: Path, run_b: Path
) -> list[DomainDifference]:
    if a.sha256 != b.sha256:
        raise UserError(f"{name}: {run_a} and {run_b} scored different texts under this name.")
    for run, domain in ((run_a, a), (run_b, b)):
        if not domain.documents:
            raise UserError(f"{run}: contains no per-document losses; score it again (--overwrite).")
    docs_a, docs_b = a.documents, b.documents
    if [doc.bytes for doc in docs_a] != [doc.bytes for doc in docs_b]:
        raise UserError(f"{name}: a document is too short for one of the tokenizers; remove it from the text.")
    rows = []
    has_same_tokens = [doc.tokens for doc in docs_a] == [doc.tokens for doc in docs_b]
    pieces_a, pieces_b = docs_a[0].pieces, docs_b[0].pieces
    by_piece = len(docs_a) == 1 and [n for _, n in pieces_a] == [n for _, n in pieces_b] and len(pieces_a) > 1
    if by_piece:
        items, nats_a, nats_b = "pieces", [nats for nats, _ in pieces_a], [nats for nats, _ in pieces_b]
        tokens = [n for _, n in pieces_a]
        # The number of bytes of a piece is not recorded; estimate it from its share of the tokens.
        num_bytes = [docs_a[0].bytes * n / docs_a[0].tokens for n in tokens]
    else:
        items, nats_a, nats_b = "documents", [doc.nats for doc in docs_a], [doc.nats for doc in docs_b]
        tokens, num_bytes = [doc.tokens for doc in docs_a], [doc.bytes for doc in docs_a]
    bits_a, bits_b = ([nats / math.log(2) for nats in values] for values in (nats_a, nats_b))
    for metric, x, y, weights in (
        ("bits_per_byte", bits_a, bits_b, num_bytes),
        ("nats_per_token", nats_a, nats_b, tokens),
    ):
        if metric == "bits_per_byte" or has_same_tokens:
            rows.append(DomainDifference(name, metric, items, len(x), *paired_difference(x, y, weights)))
    return rows


def _means(rows: list[DomainDifference]) -> list[DomainDifference]:
    means = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [row for row in rows if row.metric == metric]
        if len(own) > 1 and len(own) == len({row.domain for row in rows}):
            mean_a, mean_b, difference = (
                sum(getattr(row, name) for row in own) / len(own) for name in ("value_a", "value_b", "difference")
            )
            error = math.sqrt(sum(row.standard_error**2 for row in own)) / len(own)
            means.append(
                DomainDifference("mean of the domains", metric, "domains", len(own), mean_a, mean_b, difference, error)
            )
    return means
