"""Perplexity and bits per byte of a model on several domains.

A domain is a list of documents. They are scored one by one and their losses are summed before averaging, so every
token of a domain has the same weight. The mean over domains is unweighted, as in Mixture-of-Depths Attention (arXiv
2603.15619, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoints.model_loading import check_token_ids
from ..errors import UserError
from ..utils.progress import progress_bar
from .perplexity import exp, perplexity
from .perplexity_results import DocumentLoss, DomainPerplexity, sha256


def evaluate_domains(
    model: Any,
    tokenizer: Callable[..., Any],
    domains: Mapping[str, Sequence[str]],
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    name: str = "model",
    on_domain: Callable[[str, DomainPerplexity], object] = lambda domain, result: None,
    progress: bool | None = False,
) -> dict[str, DomainPerplexity]:
    """Score every domain.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        domains: name -> documents.
        window: tokens per forward pass and sequence; a shorter document is read in one pass.
        stride: distance between window starts.
        batch_size: windows per forward pass.
        name: name of the model in messages.
        on_domain: called with the name and the result of each domain as soon as it is scored.
        progress: as in `utils.progress.progress_bar`.

    Returns:
        Results by the name of the domain.

    Raises:
        UserError: if a domain has no text, less than one window of text, or token ids outside the vocabulary.
    """
    token_ids = {
        domain: _token_ids(model, tokenizer, domain, documents, window, name) for domain, documents in domains.items()
    }
    num_tokens = sum(max(len(ids) - 1, 0) for documents in token_ids.values() for ids in documents)
    results: dict[str, DomainPerplexity] = {}
    with progress_bar(num_tokens, "perplexity", progress, unit="tokens") as bar:
        for domain, documents in domains.items():
            results[domain] = _score(model, documents, token_ids[domain], window, stride, batch_size, bar.update)
            on_domain(domain, results[domain])
    return results


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
    scored: list[DocumentLoss] = []
    for text, ids in zip(documents, token_ids, strict=True):
        if len(ids) < 2:
            continue
        result = perplexity(model, ids, text, window=window, stride=stride, batch_size=batch_size, on_tokens=on_tokens)
        assert result.num_bytes is not None, "the text was given"
        nats = result.loss_nats_per_token * result.num_tokens
        scored.append(DocumentLoss(nats, result.num_tokens, result.num_bytes, tuple(result.pieces)))
    nats = sum(document.nats for document in scored)
    num_tokens, num_bytes = sum(document.tokens for document in scored), sum(document.bytes for document in scored)
    return DomainPerplexity(
        perplexity=exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2) / num_bytes,
        loss_nats_per_token=nats / num_tokens,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_documents=len(scored),
        num_skipped_documents=len(documents) - len(scored),
        num_documents_without_loss=sum(not math.isfinite(document.nats) for document in scored),
        sha256=sha256(documents),
        documents=tuple(scored),
    )
