"""Perplexity of a causal language model on a text, with strided windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..utils.eval_mode import eval_mode


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Result of `perplexity`.

    Attributes:
        loss_nats_per_token: mean negative log-likelihood of the scored tokens.
        perplexity: exponential of the loss.
        bits_per_byte: total negative log-likelihood in bits, divided by the number of UTF-8 bytes; comparable between
            tokenizers. None if no text was given.
        num_tokens: number of scored tokens, i.e. all except the first.
        num_bytes: number of UTF-8 bytes of the text. None if no text was given.
        pieces: `(negative log-likelihood in nats, number of tokens)` of consecutive parts of the text, each at least
            one window long except perhaps the last.
    """

    loss_nats_per_token: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    num_bytes: int | None
    pieces: tuple[tuple[float, int], ...] = field(default=(), repr=False)


class _Window(NamedTuple):
    start: int
    # Only the last `num_scored` predictions count; earlier windows have scored the others.
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
    """Compute the perplexity of a text with strided windows; every token except the first is scored exactly once.

    The model reads `window` tokens and predicts the token after each of them. Windows start `stride` tokens apart, and
    a prediction counts in the first window that contains it, where its left context is longest. The last window is
    shifted left so that it is full. After the first window, every prediction sees at least `window - stride + 1`
    tokens: `stride=1` always gives the full context, `stride=window` is the fastest.

    Args:
        model: a causal language model of transformers; called in eval mode with `use_cache=False`.
        tokenizer_or_ids: a tokenizer, which adds its default special tokens, or the token ids `[T]` of the text.
        text: the text; required with a tokenizer and for `bits_per_byte`.
        window: tokens per forward pass and sequence.
        stride: distance between window starts, at most `window`.
        batch_size: windows per forward pass.
        on_tokens: called after each forward pass with the number of tokens it scored.

    Raises:
        ValueError: if the text has fewer than two tokens, or `window`, `stride` or `batch_size` is out of range.
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
    with eval_mode(model):
        for i in range(0, len(windows), batch_size):
            batch = windows[i : i + batch_size]
            losses += _summed_losses(model, ids, batch, window)
            if on_tokens is not None:
                on_tokens(sum(w.num_scored for w in batch))

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
    """Return `math.exp(loss)`, or infinity where that overflows."""
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
            raise ValueError("text is None, but a tokenizer needs a text; pass token ids to score without one")
        # verbose=False: do not warn about texts longer than the model's context, which are split into windows.
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
    """Return each window's summed loss over its scored predictions."""
    inputs = torch.stack([ids[w.start : w.start + window] for w in windows])  # [B, W]
    targets = torch.stack([ids[w.start + 1 : w.start + 1 + window] for w in windows])  # [B, W]
    logits = model(inputs.to(model.device), use_cache=False).logits  # [B, W, V]

    num_kept = max(w.num_scored for w in windows)
    logits, targets = logits[:, -num_kept:], targets[:, -num_kept:].to(logits.device)
    # At least float32: bf16 keeps only three digits of a log-probability.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return [losses[i, -w.num_scored :].double().sum().item() for i, w in enumerate(windows)]
