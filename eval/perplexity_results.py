"""Read, check and print the JSON result file of `depthattn eval --perplexity`.

Non-finite values (a diverged model, an overflow) are stored as null.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.result_files import json_text, read_object, to_json
from ..utils.text_table import table
from .run_folder import refuse_other_settings

REPORT_FILE = "perplexity.json"
MEANS = ("perplexity", "bits_per_byte", "loss_nats_per_token")
_ADVICE = "choose another place (--out), or --overwrite"


def is_report(content: dict[str, Any]) -> bool:
    """Return whether a JSON object is a result of `evaluate_domains`."""
    parts = [content.get(name) for name in ("settings", "domains", "mean")]
    return all(isinstance(part, dict) for part in parts) and "window" in content["settings"]


def read_report(path: Path) -> dict[str, Any]:
    """Read a result of `evaluate_domains`; null becomes NaN.

    Raises:
        UserError: if the file is not a result of `evaluate_domains`.
    """
    content = read_object(path)
    if not is_report(content):
        raise UserError(f"{path}: is not a result file of --perplexity; choose another place (--out).")
    for domain in content["domains"].values():
        _fill_in(domain, MEANS)
        for document in domain.get("documents", []):
            _fill_in(document, ("nats",))
            document["pieces"] = [[math.nan if nats is None else nats, n] for nats, n in document["pieces"]]
    _fill_in(content["mean"], MEANS)
    return content


def _fill_in(values: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if values.get(name) is None:
            values[name] = math.nan


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise an error unless a result file can be written, or replaced, at this path.

    Args:
        path: the result file; need not exist.
        overwrite: whether existing results may be discarded; a file that is not a result file is never replaced.

    Raises:
        UserError: if the path is a folder, another kind of file, or not writable.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; choose another file (--out).")
    if path.exists():
        read_report(path)
        if overwrite and not os.access(path, os.W_OK):
            raise UserError(f"{path}: is write-protected; choose another file (--out).")
    # The folder is only created with the first result, so check its nearest existing parent.
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UserError(f"{path}: cannot create a file in {home}; choose another place (--out).")


def without_documents(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report without per-document losses."""
    domains = {
        name: {field: value for field, value in domain.items() if field != "documents"}
        for name, domain in report["domains"].items()
    }
    return {**report, "domains": domains}


def known_domains(
    path: Path, settings: dict[str, Any], domains: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Return the stored results of domains that need not be scored again.

    Args:
        path: the result file; need not exist.
        settings: the settings of the run.
        domains: documents by name of the domain.

    Returns:
        Results by name, of those domains whose documents are the same.

    Raises:
        UserError: if the file has results of other settings, or of a domain that is not in `domains`.
    """
    if not path.exists():
        return {}
    report = read_report(path)
    before, known = report["settings"], report["domains"]
    refuse_other_settings(path, "results with", before, settings, _ADVICE)
    if lost := [name for name in known if name not in domains]:
        raise UserError(f"{path}: holds results of {', '.join(lost)}, which would be lost; {_ADVICE}.")
    return {
        name: known[name]
        for name, documents in domains.items()
        if known.get(name, {}).get("sha256") == sha256(documents) and "documents" in known[name]
    }


def report_text(report: dict[str, Any]) -> str:
    """Return the report as indented JSON with one line per document."""
    lines: dict[str, str] = {}
    domains = {}
    for number, (name, domain) in enumerate(report["domains"].items()):
        # Placeholder: no other string of a report contains a zero byte.
        mark = f"\0{number}"
        documents = [json.dumps(to_json(document), allow_nan=False) for document in domain["documents"]]
        lines[json.dumps(mark)] = "[\n        " + ",\n        ".join(documents) + "\n      ]"
        domains[name] = {**domain, "documents": mark}
    text = json_text({**report, "domains": domains})
    for mark_text, documents_text in lines.items():
        text = text.replace(mark_text, documents_text)
    return text


def sha256(documents: Sequence[str]) -> str:
    """Hash documents, each followed by a zero byte."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def report_table(report: dict[str, Any]) -> str:
    """Return a text table with the numbers of every domain."""
    rows = [["domain", "perplexity", "bits/byte", "nats/token", "tokens", "bytes", "documents"]]
    for name, domain in report["domains"].items():
        counts = [str(domain[count]) for count in ("num_tokens", "num_bytes", "num_documents")]
        rows.append([name, *_numbers(domain), *counts])
    rows.append(["mean of the domains", *_numbers(report["mean"]), "", "", ""])
    settings = report["settings"]
    lines = [table(rows), "", f"window {settings['window']}, stride {settings['stride']}, {settings['dtype']}"]
    for name, domain in report["domains"].items():
        if count := domain["num_documents_without_loss"]:
            lines.append(f"{name}: the loss of {count} of {domain['num_documents']} documents is NaN or infinite.")
    return "\n".join(lines)


def _numbers(values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.4f}" for name in MEANS]
