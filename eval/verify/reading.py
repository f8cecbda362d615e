"""Inputs of `verify`: windows of a text, prompts for greedy continuations, and a longer text for perplexity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from ...errors import UserError
from ..perplexity import perplexity
from .comparison import Measured

#: Number of windows, spread over the text, on which logits are compared, and their largest length in tokens.
NUM_WINDOWS, WINDOW_TOKENS = 4, 128
#: Number of tokens, from the start of the text, on which perplexity is measured.
PERPLEXITY_TOKENS = 4096
PERPLEXITY_WINDOW = 512
#: Number of windows that are continued greedily, and tokens of each that serve as prompt.
NUM_PROMPTS, PROMPT_TOKENS = 2, 16
#: Largest length of a greedy text.
MAX_NEW_TOKENS = 4096

# Largest number of logits per batch of windows (1 GB in float32).
_MAX_LOGITS = 2**28
_MAX_BATCH = 8


@dataclass(frozen=True)
class ReadingPlan:
    """Inputs of both models.

    Attributes:
        windows: token ids whose logits are compared, `[N, T]`.
        window_batch: windows per forward pass.
        prompts: prompts for greedy continuations, `[P, t]`; none without a language-modelling head.
        num_new: number of new tokens of each continuation.
        perplexity_ids: token ids of the text for perplexity, if measured.
        perplexity_window: tokens per window of that text.
        perplexity_batch: windows of that text per forward pass.
    """

    windows: Tensor
    window_batch: int
    prompts: Tensor | None
    num_new: int
    perplexity_ids: Tensor | None
    perplexity_window: int
    perplexity_batch: int

    @property
    def num_steps(self) -> int:
        """Largest number of forward passes of one model."""
        steps = -(-len(self.windows) // self.window_batch)
        if self.prompts is not None:
            steps += self.num_new
        if self.perplexity_ids is not None:
            num_windows = -(-(len(self.perplexity_ids) - 1) // self.perplexity_window)
            steps += -(-num_windows // self.perplexity_batch)
        return steps


def plan_reading(
    ids: Tensor, perplexity_ids: Tensor | None, config: PreTrainedConfig, max_new_tokens: int, *, with_text: bool
) -> ReadingPlan:
    """Plan the inputs within the context length of a model.

    Args:
        ids: token ids of the text, `[T]`.
        perplexity_ids: token ids for perplexity, if it is to be measured.
        config: the host's config.
        max_new_tokens: length of the greedy text.
        with_text: whether the model has a language-modelling head.

    Raises:
        UserError: if the context length is less than two tokens.
    """
    limit = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS + max_new_tokens
    if limit < 2:
        raise UserError(f"max_position_embeddings: {limit} is too few to compare anything; at least 2 are needed.")
    windows = _windows(ids, min(WINDOW_TOKENS, limit))
    num_new = min(max_new_tokens, limit - 1)
    window = min(PERPLEXITY_WINDOW, limit)
    return ReadingPlan(
        windows=windows,
        # Classification heads only accept batches if they have a padding token.
        window_batch=_batch(windows.shape[1], config.vocab_size) if with_text else 1,
        prompts=windows[:NUM_PROMPTS, : min(PROMPT_TOKENS, limit - num_new)] if with_text else None,
        num_new=num_new,
        perplexity_ids=perplexity_ids if with_text else None,
        perplexity_window=window,
        perplexity_batch=_batch(window, config.vocab_size),
    )


def _batch(num_tokens: int, vocab_size: int) -> int:
    return max(1, min(_MAX_BATCH, _MAX_LOGITS // (num_tokens * max(vocab_size, 1))))


@torch.no_grad()
def measure(model: PreTrainedModel, plan: ReadingPlan, bar: Any) -> Measured:
    """Run a model on the planned inputs.

    Args:
        model: the model in eval mode, on its device.
        plan: the inputs.
        bar: progress bar, updated after every forward pass.
    """
    num_done = 0

    def count(*_: object) -> None:
        nonlocal num_done
        num_done += 1
        bar.update(1)

    hook = model.register_forward_hook(count)
    batches = plan.windows.to(model.device).split(plan.window_batch)
    outputs = [model(batch, use_cache=False)[0].cpu() for batch in batches]
    measured = Measured(outputs, [], [])
    if plan.prompts is not None:
        measured.greedy_tokens, measured.greedy_logits = _greedy(model, plan.prompts.to(model.device), plan.num_new)
    if plan.perplexity_ids is not None:
        window = plan.perplexity_window
        result = perplexity(
            model, plan.perplexity_ids, None, window=window, stride=window, batch_size=plan.perplexity_batch
        )
        measured.perplexity, measured.num_perplexity_tokens = result.perplexity, result.num_tokens
    hook.remove()
    # Account for steps that were saved because a greedy text ended early.
    bar.update(plan.num_steps - num_done)
    return measured


def _greedy(model: PreTrainedModel, prompts: Tensor, num_new: int) -> tuple[list[list[int]], list[Tensor]]:
    """Return greedy continuations up to the end-of-sequence token, and the logits of their tokens."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]
    # Ignore the checkpoint's generation settings (temperature, penalties) except for the end-of-sequence token.
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0)
    generate = cast(Callable[..., GenerateDecoderOnlyOutput], model.generate)
    generated = generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_new,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(cast(tuple[Tensor, ...], generated.logits), dim=1).cpu()  # [P, num_new, V]
    tokens, token_logits = [], []
    for row, row_logits in zip(generated.sequences[:, prompts.shape[1] :].tolist(), logits, strict=True):
        # The rest of the row is padding.
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        tokens.append(row[:length])
        token_logits.append(row_logits[:length])
    return tokens, token_logits


def _windows(ids: Tensor, num_tokens: int) -> Tensor:
    """Return at most `NUM_WINDOWS` windows `[N, T]`, spread evenly from the first to the last token."""
    num_tokens = min(num_tokens, len(ids))
    num_windows = min(NUM_WINDOWS, len(ids) // num_tokens)
    step = (len(ids) - num_tokens) / max(num_windows - 1, 1)
    return torch.stack([ids[round(i * step) :][:num_tokens] for i in range(num_windows)])
