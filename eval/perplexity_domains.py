"""Perplexity and bits per byte of a model on several texts, as one JSON file.

A text is a domain: a list of documents. They are scored one by one and their losses summed before the mean is taken,
so that every token of a domain counts the same. The mean over the domains is the plain one, as in the tables of
Mixture-of-Depths Attention (arXiv 2603.15619, Tables 4 and 5).

Values that are no finite numbers (a diverged model, an overflow) are null in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .result_files import json_text, read_object, to_json, write_text

REPORT_FILE = "perplexity.json"
_MEANS = ("perplexity", "bits_per_byte", "loss_nats_per_token")
_ADVICE = "choose another place (--out), or --overwrite"


@dataclass(frozen=True, slots=True)
class DomainPerplexity:
    """One domain.

    Args:
        perplexity: per token of the model's tokenizer; comparable between models with the same one only.
        bits_per_byte: comparable between all models.
        loss_nats_per_token: mean negative log-likelihood of the scored tokens.
        num_tokens: scored tokens, all but the first of each document.
        num_bytes: UTF-8 bytes of the scored documents.
        num_documents: scored documents.
        num_skipped_documents: those of fewer than two tokens.
        num_documents_without_loss: scored documents whose loss is NaN or infinite.
        sha256: of the documents, each followed by a zero byte.
        documents: of every document, in order, for paired comparisons: its summed loss in `nats`, its scored `tokens`
            and its `bytes`; and as `pieces` the losses and tokens of consecutive parts of about a window.
    """

    perplexity: float
    bits_per_byte: float
    loss_nats_per_token: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped_documents: int
    num_documents_without_loss: int
    sha256: str
    documents: list[dict[str, Any]]


def evaluate_domains(
    model: Any,
    tokenizer: Callable,
    domains: dict[str, Sequence[str]],
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    settings: dict[str, Any] | None = None,
    path: Path | None = None,
    overwrite: bool = False,
    name: str = "model",
    progress: bool | None = False,
) -> dict[str, Any]:
    """Score every domain.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        domains: name -> documents.
        window: tokens that the model reads at once; a shorter document is read in one piece.
        stride: distance of the windows.
        batch_size: windows per forward pass.
        settings: what else decides the numbers (the model, its versions); written into the result.
        path: a JSON file that is written after every domain. Domains that it holds already, of the same text, are not
            scored again.
        overwrite: forget the results that it holds.
        name: how the user named the model.
        progress: as in `conversion.progress.progress_bar`.

    Returns:
        `settings`, `domains` (name -> fields of `DomainPerplexity`) and `mean` over the domains.

    Raises:
        UserError: a domain has no text, or less than one window of it, or tokens that the model does not know;
            or `path` holds something else, or results of other settings or of domains that are not among these, which
            would be lost.
    """
    from ..utils.progress import progress_bar

    settings = {**(settings or {}), "window": window, "stride": stride}
    known: dict[str, dict[str, Any]] = {}
    if path is not None:
        check_output(path, overwrite=overwrite)
        known = {} if overwrite else _known_domains(path, settings, domains)
    to_do = {
        domain: _token_ids(model, tokenizer, domain, documents, window, name)
        for domain, documents in domains.items()
        if domain not in known
    }
    num_tokens = sum(max(len(ids) - 1, 0) for documents in to_do.values() for ids in documents)
    done: dict[str, dict[str, Any]] = {}
    with progress_bar(num_tokens, "perplexity", progress, unit="tokens") as bar:
        for domain, documents in domains.items():
            if domain in known:
                done[domain] = known[domain]
                continue
            scored = _score(model, documents, to_do[domain], window, stride, batch_size, bar.update)
            done[domain] = asdict(scored)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, _file_text(_report(settings, done)))
    return _report(settings, done)


def _report(settings: dict[str, Any], domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    means = {name: sum(domain[name] for domain in domains.values()) / len(domains) for name in _MEANS}
    return {"settings": settings, "domains": domains, "mean": means}


def _token_ids(
    model: Any, tokenizer: Callable, domain: str, documents: Sequence[str], window: int, name: str
) -> list[list[int]]:
    from ..checkpoints.model_loading import check_token_ids

    # verbose=False: a text longer than the model's context is what the windows are for.
    token_ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    # A window reads `window` tokens and predicts the one after each of them.
    num_tokens = sum(map(len, token_ids))
    if num_tokens < window + 1:
        raise UserError(
            f"{domain}: {num_tokens} tokens, less than one window of {window} and the token after it; give more text "
            "or a smaller window (--window)."
        )
    if all(len(ids) < 2 for ids in token_ids):
        raise UserError(f"{domain}: no document has two tokens; there is nothing to predict.")
    for ids in token_ids:
        check_token_ids(ids, model, name)
    return token_ids


def _score(
    model: Any,
    documents: Sequence[str],
    token_ids: Sequence[Sequence[int]],
    window: int,
    stride: int,
    batch_size: int,
    on_tokens: Callable[[int], object],
) -> DomainPerplexity:
    from .perplexity import exp, perplexity

    scored: list[dict[str, Any]] = []
    for text, ids in zip(documents, token_ids, strict=True):
        if len(ids) < 2:
            continue
        result = perplexity(model, ids, text, window=window, stride=stride, batch_size=batch_size, on_tokens=on_tokens)
        scored.append(
            {
                "nats": result.loss_nats_per_token * result.num_tokens,
                "tokens": result.num_tokens,
                "bytes": result.num_bytes,
                "pieces": [list(piece) for piece in result.pieces],
            }
        )
    nats, num_tokens, num_bytes = (sum(document[what] for document in scored) for what in ("nats", "tokens", "bytes"))
    return DomainPerplexity(
        perplexity=exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2) / num_bytes,
        loss_nats_per_token=nats / num_tokens,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_documents=len(scored),
        num_skipped_documents=len(documents) - len(scored),
        num_documents_without_loss=sum(not math.isfinite(document["nats"]) for document in scored),
        sha256=_sha256(documents),
        documents=scored,
    )


def _sha256(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


# --- the file ---


def is_report(content: dict[str, Any]) -> bool:
    """Whether a JSON object is a result of `evaluate_domains`."""
    parts = [content.get(name) for name in ("settings", "domains", "mean")]
    return all(isinstance(part, dict) for part in parts) and "window" in content["settings"]


def read_report(path: Path) -> dict[str, Any]:
    """A result of `evaluate_domains`; what is null in the file is NaN.

    Raises:
        UserError: the file holds something else.
    """
    content = read_object(path)
    if not is_report(content):
        raise UserError(f"{path}: holds no results of --perplexity; choose another place (--out).")
    for domain in content["domains"].values():
        _fill_in(domain, _MEANS)
        for document in domain.get("documents", []):
            _fill_in(document, ("nats",))
            document["pieces"] = [[math.nan if nats is None else nats, n] for nats, n in document["pieces"]]
    _fill_in(content["mean"], _MEANS)
    return content


def _fill_in(values: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if values.get(name) is None:
            values[name] = math.nan


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is no result of `evaluate_domains`, whatever the options say.

    Args:
        path: the file, which may not exist.
        overwrite: whether its results are to be forgotten.

    Raises:
        UserError: see above.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; choose another file (--out).")
    if path.exists():
        read_report(path)
        if overwrite and not os.access(path, os.W_OK):
            raise UserError(f"{path}: is write-protected; choose another file (--out).")
    # It is made when there is something to put into it.
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise UserError(f"{path}: no file can be made in {home}; choose another (--out).")


def without_documents(report: dict[str, Any]) -> dict[str, Any]:
    """The report without the losses of single documents."""
    domains = {
        name: {field: value for field, value in domain.items() if field != "documents"}
        for name, domain in report["domains"].items()
    }
    return {**report, "domains": domains}


def _known_domains(
    path: Path, settings: dict[str, Any], domains: dict[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The domains that need not be scored again."""
    if not path.exists():
        return {}
    report = read_report(path)
    before, known = report["settings"], report["domains"]
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path}: holds results with {name} {before.get(name)}, not {settings.get(name)}; {_ADVICE}."
            )
    if lost := [name for name in known if name not in domains]:
        raise UserError(f"{path}: holds results of {', '.join(lost)}, which would be lost; {_ADVICE}.")
    return {
        name: known[name]
        for name, documents in domains.items()
        if known.get(name, {}).get("sha256") == _sha256(documents) and "documents" in known[name]
    }


def _file_text(report: dict[str, Any]) -> str:
    """Readable JSON, with one line for each document."""
    lines: dict[str, str] = {}
    domains = {}
    for number, (name, domain) in enumerate(report["domains"].items()):
        # No other value of a report is a string with a zero byte.
        mark = f"\0{number}"
        documents = [json.dumps(to_json(document), allow_nan=False) for document in domain["documents"]]
        lines[json.dumps(mark)] = "[\n        " + ",\n        ".join(documents) + "\n      ]"
        domains[name] = {**domain, "documents": mark}
    text = json_text({**report, "domains": domains})
    for mark, documents in lines.items():
        text = text.replace(mark, documents)
    return text
