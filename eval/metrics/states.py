"""Metrics of the states, one forward pass each: angles, block influence, variance, contributions, magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .probe import DepthProbe, StateCallback, SublayerCallback
from .results import DepthMetric, MetricResult, depth_metric
from .sublayers import Sublayer
from .text import TextBatches

TOKENS = ("all", "last")
# Vectors with a smaller norm count as zero, i.e. have no direction.
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False, kw_only=True)
class AngularDistance(MetricResult):
    """Result of `angular_distance`.

    Attributes:
        tokens: `"all"` or `"last"`.
        distances: [L + 1, L + 1], distance d(l, m) in [0, 1]; NaN for m <= l.
        adjacent: [L], distance between z_l and z_{l+1}.
    """

    tokens: str
    distances: Tensor
    adjacent: Tensor


@depth_metric
def angular_distance(probe: DepthProbe, text: TextBatches, *, tokens: str = "all") -> AngularDistance:
    """Measure the mean angle between states (LNS, arXiv 2502.05795).

        d(l, m) = mean_t arccos(cos(z_l, z_m)) / pi

    LNS only uses the last token of a sequence and normalises rows of its plots by percentiles; DepthBench (arXiv
    2609.32534) uses all tokens. Nothing is normalised here. Memory: the states of one batch, and those of one sequence
    in float64.

    Args:
        probe: the model.
        text: the text.
        tokens: `"all"` or `"last"`.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
    number = probe.num_layers + 1
    total = torch.zeros(number, number, dtype=torch.float64)
    states: list[Tensor] = []
    with probe.observe_states(lambda index, state: states.append(state if tokens == "all" else state[:, -1:])):
        for ids in text:
            states.clear()
            probe.logits(ids)
            for sequence in zip(*states, strict=True):
                directions = _directions(torch.stack(sequence, dim=1).double())  # [T, L + 1, D]
                cosines = torch.bmm(directions, directions.transpose(1, 2)).clamp(-1, 1)
                total += cosines.arccos().sum(dim=0).cpu()
    num_tokens = text.num_tokens if tokens == "all" else text.num_sequences
    distances = torch.where(torch.ones_like(total).triu(1).bool(), total / (num_tokens * math.pi), torch.nan)
    return AngularDistance(tokens=tokens, distances=distances, adjacent=distances.diagonal(1).clone())


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInfluence(MetricResult):
    """Result of `block_influence`.

    Attributes:
        scores: [L], BI of each layer.
    """

    scores: Tensor


@depth_metric
def block_influence(probe: DepthProbe, text: TextBatches) -> BlockInfluence:
    """Measure how much a layer changes the direction of the state (ShortGPT, arXiv 2403.03853).

        BI_l = 1 - mean_t cos(z_l, z_{l+1})

    A poor proxy for importance (arXiv 2605.14075).

    Args:
        probe: the model.
        text: the text.
    """
    total = torch.zeros(probe.num_layers, dtype=torch.float64)
    before: list[Tensor] = []

    def see(index: int, state: Tensor) -> None:
        state = state.double()
        if index:
            total[index - 1] += _cosine(before[0], state).sum().item()
        before[:] = [state]

    _run(probe, text, see)
    return BlockInfluence(scores=1 - total / text.num_tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputVariance(MetricResult):
    """Result of `output_variance`.

    Attributes:
        states: [L + 1], variance of z_l.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: variance of the sublayer outputs y.
    """

    states: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor


@depth_metric
def output_variance(probe: DepthProbe, text: TextBatches) -> OutputVariance:
    """Measure the variance over channels, averaged over tokens (LNS, arXiv 2502.05795; CoD-S, arXiv 2603.15389).

        V_l = mean_t var_c(z_l[t, c])

    with the unbiased variance. CoD-S also logs it for attention and MLP outputs.

    Args:
        probe: the model.
        text: the text.
    """
    states, sublayers = _sums(probe, text, lambda x: x.var(dim=-1))
    return OutputVariance(states=states, sublayer_names=_names(probe), sublayers=sublayers)


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputMagnitude(MetricResult):
    """Result of `output_magnitude`: root mean squares over channels, averaged over tokens.

    Attributes:
        states: [L + 1], magnitude of z_l.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: magnitude of the sublayer outputs y.
        sources: with AttnRes, magnitude of every source of the output site (embedding, blocks); else `None`.
    """

    states: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor
    sources: Tensor | None


@depth_metric
def output_magnitude(probe: DepthProbe, text: TextBatches) -> OutputMagnitude:
    """Measure the magnitude of states, sublayer outputs and block sums (AttnRes, arXiv 2603.15031, Fig. 5).

        M_l = mean_t sqrt(mean_c z_l[t, c]^2)

    Args:
        probe: the model.
        text: the text.
    """
    sources: list[float] = []

    def see(site: nn.Module, args: tuple[Any, ...]) -> None:
        found = [_rms(source.double()).sum().item() for source in (*args[0].sources, args[0].partial)]
        sources[:] = [a + b for a, b in zip(sources, found, strict=True)] if sources else found

    if not probe.mixes_sources:
        states, sublayers = _sums(probe, text, _rms)
        return OutputMagnitude(states=states, sublayer_names=_names(probe), sublayers=sublayers, sources=None)
    with probe.layers[-1].out_depth.register_forward_pre_hook(see):
        states, sublayers = _sums(probe, text, _rms)
    return OutputMagnitude(
        states=states,
        sublayer_names=_names(probe),
        sublayers=sublayers,
        sources=torch.tensor(sources, dtype=torch.float64) / text.num_tokens,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class RelativeContribution(MetricResult):
    """Result of `relative_contribution`, averaged over tokens.

    Attributes:
        layers: [L], ||u_l|| / ||z_l|| with u_l = z_{l+1} - z_l.
        layer_cosines: [L], cos(u_l, z_l); negative if a layer reduces the state, positive if it reinforces it.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayers: ||y|| / ||h|| of each sublayer.
        sublayer_cosines: cos(y, h) of each sublayer.
    """

    layers: Tensor
    layer_cosines: Tensor
    sublayer_names: tuple[str, ...]
    sublayers: Tensor
    sublayer_cosines: Tensor


@depth_metric
def relative_contribution(probe: DepthProbe, text: TextBatches) -> RelativeContribution:
    """Measure updates relative to the state that they are added to (EFF, arXiv 2505.13898).

        ||a_l + m_l|| / ||h_l||,  cos(a_l + m_l, h_l)       and for every sublayer ||y|| / ||h||, cos(y, h)

    Args:
        probe: the model.
        text: the text.
    """
    layers = torch.zeros(2, probe.num_layers, dtype=torch.float64)
    names = _names(probe)
    sublayers = torch.zeros(2, len(names), dtype=torch.float64)
    number = {name: index for index, name in enumerate(names)}
    before: list[Tensor] = []

    def add(table: Tensor, column: int, change: Tensor, stream: Tensor) -> None:
        ratio = change.norm(dim=-1) / stream.norm(dim=-1).clamp_min(_SMALLEST_NORM)
        table[0, column] += ratio.sum().item()
        table[1, column] += _cosine(change, stream).sum().item()

    def see(index: int, state: Tensor) -> None:
        state = state.double()
        if index:
            add(layers, index - 1, state - before[0], before[0])
        before[:] = [state]

    _run(probe, text, see, lambda sublayer, x, y: add(sublayers, number[sublayer.name], y.double(), x.double()))
    layers, sublayers = layers / text.num_tokens, sublayers / text.num_tokens
    return RelativeContribution(
        layers=layers[0],
        layer_cosines=layers[1],
        sublayer_names=names,
        sublayers=sublayers[0],
        sublayer_cosines=sublayers[1],
    )


def _sums(probe: DepthProbe, text: TextBatches, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return means over tokens of `function` ([B, T, D] -> [B, T]) for every state and sublayer output."""
    names = _names(probe)
    number = {name: index for index, name in enumerate(names)}
    states = torch.zeros(probe.num_layers + 1, dtype=torch.float64)
    sublayers = torch.zeros(len(names), dtype=torch.float64)

    def see_state(index: int, state: Tensor) -> None:
        states[index] += function(state.double()).sum().item()

    def see_sublayer(sublayer: Sublayer, x: Tensor, y: Tensor) -> None:
        sublayers[number[sublayer.name]] += function(y.double()).sum().item()

    _run(probe, text, see_state, see_sublayer)
    return states / text.num_tokens, sublayers / text.num_tokens


def _run(
    probe: DepthProbe, text: TextBatches, see_state: StateCallback, see_sublayer: SublayerCallback | None = None
) -> None:
    with probe.observe_states(see_state):
        if see_sublayer is None or not probe.knows_sublayers:
            for ids in text:
                probe.logits(ids)
            return
        with probe.observe_sublayers(see_sublayer):
            for ids in text:
                probe.logits(ids)


def _names(probe: DepthProbe) -> tuple[str, ...]:
    return tuple(sublayer.name for sublayer in probe.sublayers) if probe.knows_sublayers else ()


def _directions(x: Tensor) -> Tensor:
    norm: Tensor = x.norm(dim=-1, keepdim=True)
    return x / norm.clamp_min(_SMALLEST_NORM)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return (_directions(x) * _directions(y)).sum(dim=-1)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=-1).sqrt()


METRICS = {
    "output_magnitude": DepthMetric(output_magnitude, lambda probe: 1.2, True),
    "output_variance": DepthMetric(output_variance, lambda probe: 1.2, True),
    "relative_contribution": DepthMetric(relative_contribution, lambda probe: 1.5, True),
    "block_influence": DepthMetric(block_influence, lambda probe: 1.2, True),
    "angular_distance": DepthMetric(angular_distance, lambda probe: 2.0, True),
}
