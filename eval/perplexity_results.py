"""Results of `depthattn eval --perplexity`: their classes, their JSON file and their table.

Non-finite values (a diverged model, an overflow) are stored as null.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.result_files import json_text, to_json
from ..utils.text_table import table
from .run_folder import FileLayout, RunFile, read_run_file

REPORT_FILE = "perplexity.json"
_LAYOUT = FileLayout(
    content="a result file of --perplexity",
    parts="domains",
    further=("mean",),
    required_settings=frozenset({"window"}),
)


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """Loss of one document, for paired comparisons.

    Args:
        nats: total negative log-likelihood of the scored tokens.
        tokens: number of scored tokens.
        bytes: number of UTF-8 bytes.
        pieces: losses and token counts of consecutive parts of about one window.
    """

    nats: float
    tokens: int
    bytes: int
    pieces: tuple[tuple[float, int], ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DocumentLoss:
        """Build from the JSON values of the fields; null becomes NaN."""
        pieces = tuple((_number(nats), num_tokens) for nats, num_tokens in values["pieces"])
        return cls(_number(values["nats"]), values["tokens"], values["bytes"], pieces)


@dataclass(frozen=True, slots=True)
class MeanPerplexity:
    """Losses of a text in three units.

    Args:
        perplexity: per token; comparable only between models with the same tokenizer.
        bits_per_byte: comparable between all models.
        loss_nats_per_token: mean negative log-likelihood of the scored tokens.
    """

    perplexity: float
    bits_per_byte: float
    loss_nats_per_token: float


_UNITS = tuple(field.name for field in dataclasses.fields(MeanPerplexity))


@dataclass(frozen=True, slots=True)
class DomainPerplexity(MeanPerplexity):
    """Result of one domain.

    Args:
        num_tokens: number of scored tokens, i.e. all except the first of each document.
        num_bytes: number of UTF-8 bytes of the scored documents.
        num_documents: number of scored documents.
        num_skipped_documents: number of documents with fewer than two tokens.
        num_documents_without_loss: number of scored documents whose loss is NaN or infinite.
        sha256: hash of the documents, each followed by a zero byte.
        documents: the scored documents in order; empty in files of older versions.
    """

    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped_documents: int
    num_documents_without_loss: int
    sha256: str
    documents: tuple[DocumentLoss, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DomainPerplexity:
        """Build from the JSON values of the fields; null becomes NaN."""
        units = {name: _number(values[name]) for name in _UNITS}
        documents = tuple(map(DocumentLoss.from_dict, values.get("documents", ())))
        return cls(**{**values, **units, "documents": documents})


@dataclass(frozen=True, slots=True)
class PerplexityReport:
    """Results of one model on several domains.

    Args:
        settings: settings that determine the numbers, as JSON values; among them `window`, `stride` and `dtype`.
        domains: results by the name of the domain.
    """

    settings: dict[str, Any]
    domains: dict[str, DomainPerplexity]

    @property
    def mean(self) -> MeanPerplexity:
        """The unweighted mean over the domains."""
        values = {name: [getattr(domain, name) for domain in self.domains.values()] for name in _UNITS}
        return MeanPerplexity(**{name: sum(column) / len(column) for name, column in values.items()})

    def to_dict(self, *, documents: bool = True) -> dict[str, Any]:
        """Return the settings, domains and mean as JSON values.

        Args:
            documents: include the losses of single documents.
        """
        values: dict[str, Any] = to_json({**asdict(self), "mean": asdict(self.mean)})
        if not documents:
            for domain in values["domains"].values():
                del domain["documents"]
        return values

    def to_text(self) -> str:
        """Return the report as indented JSON with one line per document."""
        values = self.to_dict()
        lines: dict[str, str] = {}
        for number, domain in enumerate(values["domains"].values()):
            # Placeholder: no other string of a report contains a zero byte.
            mark = f"\0{number}"
            documents = [json.dumps(document, allow_nan=False) for document in domain["documents"]]
            lines[json.dumps(mark)] = "[\n        " + ",\n        ".join(documents) + "\n      ]"
            domain["documents"] = mark
        text = json_text(values)
        for mark_text, documents_text in lines.items():
            text = text.replace(mark_text, documents_text)
        return text

    def to_table(self) -> str:
        """Return a text table with the numbers of every domain."""
        rows = [["domain", "perplexity", "bits/byte", "nats/token", "tokens", "bytes", "documents"]]
        for name, domain in self.domains.items():
            counts = [str(count) for count in (domain.num_tokens, domain.num_bytes, domain.num_documents)]
            rows.append([name, *_cells(domain), *counts])
        rows.append(["mean of the domains", *_cells(self.mean), "", "", ""])
        settings = self.settings
        lines = [table(rows), "", f"window {settings['window']}, stride {settings['stride']}, {settings['dtype']}"]
        for name, domain in self.domains.items():
            if count := domain.num_documents_without_loss:
                lines.append(f"{name}: the loss of {count} of {domain.num_documents} documents is NaN or infinite.")
        return "\n".join(lines)


def read_report(path: Path) -> PerplexityReport:
    """Read a result file.

    Args:
        path: the file.

    Raises:
        UserError: if it is not a result file of `--perplexity`.
    """
    content = read_run_file(path, _LAYOUT)
    return PerplexityReport(content["settings"], _domains(path, content["domains"]))


class PerplexityFile(RunFile):
    """Result file of `--perplexity`; see `RunFile`.

    Args:
        path: the file; need not exist.
        overwrite: discard existing results.

    Raises:
        UserError: if the path is a folder, another kind of file, or not writable.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        super().__init__(path, _LAYOUT, overwrite=overwrite)

    def known_domains(
        self, settings: Mapping[str, Any], domains: Mapping[str, Sequence[str]]
    ) -> dict[str, DomainPerplexity]:
        """Return the stored results of domains that need not be scored again, because their text is the same.

        Args:
            settings: settings that determine the numbers, as JSON values.
            domains: name -> documents.

        Raises:
            UserError: if the file contains results of other settings, or of domains that would be lost.
        """
        stored = _domains(self.path, self.resume(settings, domains))
        return {
            name: known
            for name, documents in domains.items()
            if (known := stored.get(name)) is not None and known.documents and known.sha256 == sha256(documents)
        }

    def store(self, report: PerplexityReport) -> None:
        """Replace the file by a report."""
        self.write(report.to_text())


def _domains(path: Path, stored: Mapping[str, Any]) -> dict[str, DomainPerplexity]:
    try:
        return {name: DomainPerplexity.from_dict(values) for name, values in stored.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not {_LAYOUT.content}; choose another place (--out).") from error


def sha256(documents: Sequence[str]) -> str:
    """Hash documents, each followed by a zero byte."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _cells(values: MeanPerplexity) -> list[str]:
    return [f"{getattr(values, name):.4f}" for name in _UNITS]
