"""Perplexity of a causal language model on a text, with strided windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """What `perplexity` measured.

    Args:
        loss_nats_per_token: mean negative log-likelihood of the scored tokens.
        perplexity: its exponential.
        bits_per_byte: summed negative log-likelihood in bits over the UTF-8 bytes of the text; comparable between
            tokenizers. None when no text was given.
        num_tokens: scored tokens, all but the first one of the text.
        num_bytes: UTF-8 bytes of the text, None when no text was given.
        pieces: negative log-likelihood in nats and number of tokens of consecutive parts of the text, each of at least
            a window (the last may be shorter); they sum to the whole.
    """

    loss_nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None
    pieces: tuple[tuple[float, int], ...] = field(default=(), repr=False)


class _Window(NamedTuple):
    start: int
    # The window scores its last `num_scored` predictions, the ones before it have scored the others.
    num_scored: int


def perplexity(
    model: PreTrainedModel,
    tokenizer_or_ids: Callable[..., Any] | Sequence[int] | torch.Tensor,
    text: str | None,
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    on_tokens: Callable[[int], object] | None = None,
) -> PerplexityResult:
    """Scores every token of a text but the first one exactly once.

    The model reads `window` tokens and predicts the token after each of them. Windows start `stride` tokens apart, and
    a prediction counts in the first window that contains it, where its left context is longest; the last window is
    moved left until it is full. So every prediction beyond the first window sees at least `window - stride + 1`
    tokens; `stride=1` gives each the full window, `stride=window` is the fastest.

    Args:
        model: a causal language model of transformers; called in evaluation mode with `use_cache=False`.
        tokenizer_or_ids: a tokenizer, which adds its usual special tokens, or the token ids of the text `[T]`.
        text: the text; needed by a tokenizer and for `bits_per_byte`.
        window: tokens that the model reads at once.
        stride: distance of the windows, at most `window`.
        batch_size: windows per forward pass.
        on_tokens: called after each forward pass with the number of tokens that it scored.

    Raises:
        ValueError: fewer than two tokens, or a `window`, `stride` or `batch_size` out of range.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be between 1 and window={window}, got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids = _token_ids(tokenizer_or_ids, text)
    if len(ids) < 2:
        raise ValueError(f"perplexity needs a text of at least 2 tokens, got {len(ids)}")

    num_predictions = len(ids) - 1
    window = min(window, num_predictions)
    windows = _windows(num_predictions, window, stride)
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(windows), batch_size):
            batch = windows[i : i + batch_size]
            losses += _summed_losses(model, ids, batch, window)
            if on_tokens is not None:
                on_tokens(sum(w.num_scored for w in batch))
    finally:
        model.train(was_training)

    total = sum(losses)
    loss = total / num_predictions
    num_bytes = None if text is None else len(text.encode())
    return PerplexityResult(
        loss_nats_per_token=loss,
        perplexity=exp(loss),
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
        num_tokens=num_predictions,
        num_bytes=num_bytes,
        pieces=_pieces(losses, windows, window),
    )


def exp(loss: float) -> float:
    """The perplexity of a loss: infinite when it is too large for a number, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _pieces(losses: list[float], windows: list[_Window], least: int) -> tuple[tuple[float, int], ...]:
    pieces: list[tuple[float, int]] = []
    for loss, w in zip(losses, windows, strict=True):
        if pieces and pieces[-1][1] < least:
            pieces[-1] = (pieces[-1][0] + loss, pieces[-1][1] + w.num_scored)
        else:
            pieces.append((loss, w.num_scored))
    return tuple(pieces)


def _token_ids(tokenizer_or_ids: Callable[..., Any] | Sequence[int] | torch.Tensor, text: str | None) -> torch.Tensor:
    if callable(tokenizer_or_ids) and not isinstance(tokenizer_or_ids, torch.Tensor):
        if text is None:
            raise ValueError("text is None, but a tokenizer needs one; give token ids to score without a text")
        # verbose=False: a text longer than the model's context is what the windows are for.
        tokenizer_or_ids = tokenizer_or_ids(text, verbose=False)["input_ids"]
    ids = torch.as_tensor(tokenizer_or_ids, dtype=torch.long)
    if ids.dim() != 1:
        raise ValueError(f"token ids must have the shape [T], got {list(ids.shape)}")
    return ids


def _windows(num_predictions: int, window: int, stride: int) -> list[_Window]:
    windows = [_Window(0, window)]
    num_done = window
    while num_done < num_predictions:
        num_scored = min(stride, num_predictions - num_done)
        num_done += num_scored
        windows.append(_Window(num_done - window, num_scored))
    return windows


@torch.no_grad()
def _summed_losses(model: PreTrainedModel, ids: torch.Tensor, windows: list[_Window], window: int) -> list[float]:
    """Of each window, over the predictions that count in it."""
    inputs = torch.stack([ids[w.start : w.start + window] for w in windows])  # [B, W]
    targets = torch.stack([ids[w.start + 1 : w.start + 1 + window] for w in windows])  # [B, W]
    logits = model(inputs.to(model.device), use_cache=False).logits  # [B, W, V]

    num_kept = max(w.num_scored for w in windows)
    logits, targets = logits[:, -num_kept:], targets[:, -num_kept:].to(logits.device)
    # float32 at least: bf16 keeps three digits of a log-probability.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return [losses[i, -w.num_scored :].double().sum().item() for i, w in enumerate(windows)]
