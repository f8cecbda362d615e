"""States of a model over a text: what several metrics compute from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .probe import DepthProbe, StateCallback, SublayerCallback
from .sublayers import Sublayer
from .text import TextBatches

# Vectors with a smaller norm count as zero, i.e. have no direction.
SMALLEST_NORM = 1e-12


def mean_over_tokens(
    probe: DepthProbe, text: TextBatches, function: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return means over tokens of `function` ([B, T, D] -> [B, T]) for every state and sublayer output."""
    names = sublayer_names(probe)
    number = {name: index for index, name in enumerate(names)}
    states = torch.zeros(probe.num_layers + 1, dtype=torch.float64)
    sublayers = torch.zeros(len(names), dtype=torch.float64)

    def see_state(index: int, state: Tensor) -> None:
        states[index] += function(state.double()).sum().item()

    def see_sublayer(sublayer: Sublayer, x: Tensor, y: Tensor) -> None:
        sublayers[number[sublayer.name]] += function(y.double()).sum().item()

    observe(probe, text, see_state, see_sublayer)
    return states / text.num_tokens, sublayers / text.num_tokens


def observe(
    probe: DepthProbe, text: TextBatches, see_state: StateCallback, see_sublayer: SublayerCallback | None = None
) -> None:
    """Run the text, calling `see_state` for every state and `see_sublayer` for every sublayer that can be seen."""
    with probe.observe_states(see_state):
        if see_sublayer is None or not probe.knows_sublayers:
            for ids in text:
                probe.logits(ids)
            return
        with probe.observe_sublayers(see_sublayer):
            for ids in text:
                probe.logits(ids)


def sublayer_names(probe: DepthProbe) -> tuple[str, ...]:
    """Return the names of the sublayers, in order; empty if the probe does not know them."""
    return tuple(sublayer.name for sublayer in probe.sublayers) if probe.knows_sublayers else ()


def unit_vectors(x: Tensor) -> Tensor:
    """Return `x` [..., D] divided by its norm."""
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(SMALLEST_NORM)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosines [...] of `x` and `y` [..., D]."""
    return (unit_vectors(x) * unit_vectors(y)).sum(dim=-1)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square over channels."""
    return x.square().mean(dim=-1).sqrt()
