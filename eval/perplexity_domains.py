"""Perplexity and bits per byte of a model on several texts.

A text is a domain: a list of documents. They are scored one by one and their losses summed before the mean is taken,
so that every token of a domain counts the same. The mean over the domains is the plain one, as in the tables of
Mixture-of-Depths Attention (arXiv 2603.15619, Tables 4 and 5).
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
        window: tokens that the model reads at once; a shorter document is read in one piece.
        stride: distance of the windows.
        batch_size: windows per forward pass.
        settings: what else decides the numbers (the model, its versions); written into the result.
        path: a JSON file that is written after every domain. Domains that it holds already, of the same text, are not
            scored again.
        overwrite: discard the results that it holds.
        name: how the user named the model.
        progress: as in `utils.progress.progress_bar`.

    Returns:
        `settings`, `domains` (name -> fields of `DomainPerplexity`) and `mean` over the domains.

    Raises:
        UserError: a domain has no text, or less than one window of it, or tokens that the model does not know;
            or `path` holds something else, or results of other settings or of domains that are not among these, which
            would be lost.
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
