"""Perplexity and bits per byte of a model on several texts, as one JSON file.

A text is a domain: a file, a folder of files, or a data set. Its documents are scored one by one and their losses
summed before the mean is taken, so that every token of a domain counts the same. The mean over the domains is the
plain one, as in the tables of Mixture-of-Depths Attention (arXiv 2603.15619, Tables 4 and 5).
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

from hf_depthattn.conversion.checkpoint_files import ConversionError

_TEXT_SUFFIXES = (".txt", ".md")
_DATASET_PREFIX = "hf:"


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
        sha256: of the documents, each followed by a zero byte.
    """

    perplexity: float
    bits_per_byte: float
    loss_nats_per_token: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped_documents: int
    sha256: str


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

    Returns:
        `settings`, `domains` (name -> fields of `DomainPerplexity`) and `mean` over the domains.

    Raises:
        ConversionError: a domain has no text, or less than one window of it; or `path` holds results of other
            settings or of domains that are not among these, which would be lost.
    """
    settings = {**(settings or {}), "window": window, "stride": stride}
    known = _read(path, settings, domains)
    done: dict[str, dict[str, Any]] = {}
    for name, documents in domains.items():
        digest = _sha256(documents)
        if known.get(name, {}).get("sha256") == digest:
            done[name] = known[name]
        else:
            done[name] = asdict(_score(model, tokenizer, name, documents, digest, window, stride, batch_size))
        report = {"settings": settings, "domains": done, "mean": _mean(list(done.values()))}
        if path is not None:
            _write(path, report)
    return report


def _score(
    model: Any,
    tokenizer: Callable,
    name: str,
    documents: Sequence[str],
    digest: str,
    window: int,
    stride: int,
    batch_size: int,
) -> DomainPerplexity:
    from hf_depthattn.conversion.model_loading import check_token_ids
    from hf_depthattn.eval.perplexity import perplexity

    token_ids = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    for ids in token_ids:
        check_token_ids(ids, model, name)
    # A window reads `window` tokens and predicts the one after each of them.
    num_tokens = sum(map(len, token_ids))
    if num_tokens < window + 1:
        raise ConversionError(
            f"{name}: {num_tokens} tokens, less than one window of {window} and the token after it; give more text or "
            "a smaller window (--window)."
        )
    summed_loss = num_scored = num_bytes = num_skipped = 0
    for text, ids in zip(documents, token_ids, strict=True):
        if len(ids) < 2:
            num_skipped += 1
            continue
        result = perplexity(model, ids, text, window=window, stride=stride, batch_size=batch_size)
        summed_loss += result.loss_nats_per_token * result.num_tokens
        num_scored += result.num_tokens
        num_bytes += result.num_bytes
    loss = summed_loss / num_scored
    return DomainPerplexity(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=summed_loss / math.log(2) / num_bytes,
        loss_nats_per_token=loss,
        num_tokens=num_scored,
        num_bytes=num_bytes,
        num_documents=len(documents) - num_skipped,
        num_skipped_documents=num_skipped,
        sha256=digest,
    )


def read_domains(arguments: Iterable[str]) -> dict[str, list[str]]:
    """Documents of the domains that are named on a command line.

    Args:
        arguments: each `SOURCE` or `NAME=SOURCE`. A source is a UTF-8 file (one document), a `.jsonl` file (the field
            `text` of each line), a folder (each `.txt` and `.md` file is a document), or a data set as
            `hf:ID[@CONFIG]:SPLIT[:COLUMN]`, column `text` by default.

    Raises:
        ConversionError: a source does not exist, holds no text, or a name occurs twice.
    """
    domains: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        if not equals:
            source = argument
            name = argument if argument.startswith(_DATASET_PREFIX) else Path(argument).name
        if name in domains:
            raise ConversionError(f"--perplexity {argument}: the name {name} occurs twice; give NAME=SOURCE.")
        domains[name] = [text for text in _documents(source) if text.strip()]
        if not domains[name]:
            raise ConversionError(f"--perplexity {argument}: holds no text.")
    return domains


def _documents(source: str) -> list[str]:
    if source.startswith(_DATASET_PREFIX):
        return _dataset_documents(source)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
        return [_read_text(file) for file in files]
    if path.suffix == ".jsonl":
        return _jsonl_documents(path)
    return [_read_text(path)]


def _jsonl_documents(path: Path) -> list[str]:
    documents = []
    # By line feeds alone: `splitlines` would also cut at characters such as U+2028, which JSON allows inside strings.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{path}: line {number} is no JSON object with a field 'text'.") from error
    return documents


def _dataset_documents(source: str) -> list[str]:
    from hf_depthattn.conversion.sources import one_line

    parts = source.removeprefix(_DATASET_PREFIX).split(":")
    if len(parts) not in (2, 3):
        raise ConversionError(f"--perplexity {source}: must be hf:ID[@CONFIG]:SPLIT[:COLUMN].")
    (dataset_id, _, config), split, column = parts[0].partition("@"), parts[1], (parts[2:] or ["text"])[0]
    try:
        from datasets import load_dataset

        return list(load_dataset(dataset_id, config or None, split=split)[column])
    except ImportError as error:
        raise ConversionError("datasets is not installed; pip install 'hf-depthattn[eval]'.") from error
    except Exception as error:
        # Whatever a data set's host or reader raises: it is not to be had.
        raise ConversionError(f"--perplexity {source}: the data could not be loaded: {one_line(error)}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}.") from error


def _sha256(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _mean(domains: list[dict[str, Any]]) -> dict[str, float]:
    names = ("perplexity", "bits_per_byte", "loss_nats_per_token")
    return {name: sum(domain[name] for domain in domains) / len(domains) for name in names}


def _read(path: Path | None, settings: dict[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path}: is not JSON; choose another file (--out).") from error
    before, known = report.get("settings", {}), report.get("domains", {})
    advice = "choose another place (--out), or --overwrite"
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise ConversionError(
                f"{path}: holds results with {name} {before.get(name)}, not {settings.get(name)}; {advice}."
            )
    if lost := [name for name in known if name not in names]:
        raise ConversionError(f"{path}: holds results of {', '.join(lost)}, which would be lost; {advice}.")
    return known


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
