"""Mean depth weights of a model on text: per AttnRes site and source, and of MoDA's slots per layer.

Two shortcuts that return a tensor, used by the demo; `routing` has the full metrics of the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...utils.eval_mode import eval_mode


def mean_depth_weights(model: PreTrainedModel, batches: Iterable[Tensor]) -> Tensor:
    """Return depth weights averaged over tokens and depth heads.

    Args:
        model: a model with depth attention; its training mode is restored.
        batches: token ids `[B, T]` each.

    Returns:
        `[num_sites, num_sources]` in float64, sites in the order attention 0, MLP 0, ..., output site; NaN where a
        site does not read a source. The last source of a site is its newest one (the open block, or the block just
        finished).

    Raises:
        ValueError: if there are no batches, or the model has no depth weights (`connection="residual"`).
    """
    sums: list[Tensor] = []
    num_tokens = 0
    for output, num_in_batch in _outputs(model, batches):
        if any(weights is None for weights in output.depth_attentions):
            raise ValueError(f"connection: {model.config.connection!r} has no depth weights.")
        summed = [weights.double().mean(dim=-2).sum(dim=(0, 1)).cpu() for weights in output.depth_attentions]
        sums = [a + b for a, b in zip(sums, summed, strict=True)] if sums else summed
        num_tokens += num_in_batch
    table = torch.full((len(sums), max(len(row) for row in sums)), float("nan"), dtype=torch.float64)
    for site, row in enumerate(sums):
        table[site, : len(row)] = row / num_tokens
    return table


def mean_slot_mass(model: PreTrainedModel, batches: Iterable[Tensor]) -> Tensor:
    """Return the total weight of all depth slots in each layer's attention, averaged over tokens and query heads.

    Args:
        model: a model with MoDA; its training mode is restored.
        batches: token ids `[B, T]` each.

    Returns:
        `[num_layers]` in float64; NaN for layers that read no slots. The rest up to 1 is the weight of the sequence.
        Gates are included: a zero gate gives 0, a negative one a negative weight.

    Raises:
        ValueError: if there are no batches, or the model has no depth slots (`depth_kv=None`).
    """
    if model.config.depth_kv is None:
        raise ValueError("depth_kv: None has no depth slots; use a model with 'attention' or 'attention+mlp'.")
    sums = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    num_tokens = 0
    for output, num_in_batch in _outputs(model, batches):
        for layer, weights in enumerate(output.depth_kv_attentions):
            sums[layer] += math.nan if weights is None else weights.double().sum(dim=-1).mean(dim=1).sum().item()
        num_tokens += num_in_batch
    return sums / num_tokens


@torch.no_grad()
def _output(model: PreTrainedModel, input_ids: Tensor) -> Any:
    return model(input_ids.to(model.device), output_depth_attentions=True, use_cache=False)


def _outputs(model: PreTrainedModel, batches: Iterable[Tensor]) -> Iterator[tuple[Any, int]]:
    """Yield the output of the model in eval mode for each batch, and the number of its tokens."""
    is_empty = True
    with eval_mode(model):
        for input_ids in batches:
            is_empty = False
            yield _output(model, input_ids), input_ids.numel()
    if is_empty:
        raise ValueError("batches: empty; give at least one batch of token ids.")


def site_names(num_layers: int) -> list[str]:
    """Return the names of the sites in the order of `mean_depth_weights`."""
    return [f"{kind} {layer}" for layer in range(num_layers) for kind in ("attn", "mlp")] + ["output"]
