"""Perplexity and bits per byte of a model on several domains.

A domain is a list of documents. They are scored one by one and their losses are summed before averaging, so every
token of a domain has the same weight. The mean over domains is unweighted, as in Mixture-of-Depths Attention (arXiv
2603.15619, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.model_loading import check_token_ids
from ..errors import UserError
from ..utils.progress import progress_bar
from ..utils.result_files import write_text
from .perplexity import exp, perplexity
from .perplexity_results import MEANS, check_output, known_domains, report_text, sha256


@dataclass(frozen=True, slots=True)
class DomainPerplexity:
    """Result of one domain.

    Attributes:
        perplexity: per token; comparable only between models with the same tokenizer.
        bits_per_byte: comparable between all models.
        loss_nats_per_token: mean negative log-likelihood of the scored tokens.
        num_tokens: number of scored tokens, i.e. all except the first of each document.
        num_bytes: number of UTF-8 bytes of the scored documents.
        num_documents: number of scored documents.
        num_skipped_documents: number of documents with fewer than two tokens.
        num_documents_without_loss: number of scored documents whose loss is NaN or infinite.
        sha256: hash of the documents, each followed by a zero byte.
        documents: per-document numbers for paired comparisons, in order: total loss in `nats`, number of scored
            `tokens`, number of `bytes`, and `pieces`, the losses and token counts of consecutive parts of about one
            window.
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
    tokenizer: Callable[..., Any],
    domains: Mapping[str, Sequence[str]],
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
        window: tokens per forward pass and sequence; a shorter document is read in one pass.
        stride: distance between window starts.
        batch_size: windows per forward pass.
        settings: other settings that determine the numbers (model, library versions); stored in the result.
        path: JSON file that is written after every domain. Domains that it already contains, with the same text, are
            not scored again.
        overwrite: discard existing results in the file.
        name: name of the model in messages.
        progress: as in `utils.progress.progress_bar`.

    Returns:
        `settings`, `domains` (name -> fields of `DomainPerplexity`) and `mean` over the domains.

    Raises:
        UserError: if a domain has no text, less than one window of text, or token ids outside the vocabulary; or if
            `path` is not a result file, or contains results of other settings or of domains that would be lost.
    """
    settings = {**(settings or {}), "window": window, "stride": stride}
    known: dict[str, dict[str, Any]] = {}
    if path is not None:
        check_output(path, overwrite=overwrite)
        known = {} if overwrite else known_domains(path, settings, domains)
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
                write_text(path, report_text(_report(settings, done)))
    return _report(settings, done)


def _report(settings: dict[str, Any], domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    means = {name: sum(domain[name] for domain in domains.values()) / len(domains) for name in MEANS}
    return {"settings": settings, "domains": domains, "mean": means}


def _token_ids(
    model: Any, tokenizer: Callable[..., Any], domain: str, documents: Sequence[str], window: int, name: str
) -> list[list[int]]:
    # verbose=False: do not warn about texts longer than the model's context, which are split into windows.
    token_ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    # A window reads `window` tokens and predicts the one after each of them.
    num_tokens = sum(map(len, token_ids))
    if num_tokens < window + 1:
        raise UserError(
            f"{domain}: {num_tokens} tokens, less than one window of {window} and the token after it; use more text "
            "or a smaller window (--window)."
        )
    if all(len(ids) < 2 for ids in token_ids):
        raise UserError(f"{domain}: no document has at least two tokens; nothing to score.")
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
        sha256=sha256(documents),
        documents=scored,
    )
