"""Causal scores: how much the updates of later layers change when one layer is skipped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .probing.interventions import MixSkip, SlotSkip
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches
from .probing.token_losses import token_losses
from .source_drop import skip_sublayer

LEVELS = ("layer", "sublayer")


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalScores(MetricResult):
    """Result of `causal_scores` for n layers or sublayers.

    Attributes:
        level: `"layer"` or `"sublayer"`.
        names: n names of layers or sublayers.
        scores: [n, n], C(s, l) with row s skipped and column l observed: the ratio of mean norms (CoD-S). NaN for l <=
            s.
        token_scores: [n, n], mean over tokens of the ratio of norms (DepthBench), without tokens whose u_l is zero.
        per_skipped: [n], row means of `scores`; NaN for the last row.
        mean: mean of the strict upper triangle of `scores`, comparable between models of different depth.
        token_mean: the same mean of `token_scores`.
        loss_increase: [n], loss with s skipped minus loss of the model, in nats.
        slots: the `SlotSkip` rule.
        mix: the `MixSkip` rule.
    """

    level: str
    names: tuple[str, ...]
    scores: Tensor
    token_scores: Tensor
    per_skipped: Tensor
    mean: float
    token_mean: float
    loss_increase: Tensor
    slots: str
    mix: str


@depth_metric
def causal_scores(
    probe: DepthProbe,
    text: TextBatches,
    *,
    level: str = "layer",
    slots: SlotSkip = SlotSkip.ZERO,
    mix: MixSkip = MixSkip.REMIX,
) -> CausalScores:
    """Measure how skipping s changes the update of every later l (CoD-S, arXiv 2603.15389).

        C(s, l) = mean_t ||u'_l - u_l|| / mean_t ||u_l||,  l > s       u_l = z_{l+1} - z_l, u' with s skipped

    At `level="sublayer"`, u_l is the sublayer's output y, and a skipped sublayer writes nothing: it adds 0 to a
    residual stream. With AttnRes, a source that would only contain this output is excluded from the reads, which are
    renormalised.

    The global score is the mean of the upper triangle. DepthBench (arXiv 2609.32534) also divides by sqrt(L), which
    makes it depend on the depth of the model.

    Memory: u of all layers for one batch, i.e. (L + 1) B T D numbers.

    Args:
        probe: the model.
        text: the text.
        level: `"layer"` or `"sublayer"`.
        slots: how later layers see the MoDA slots of a skipped layer; only for `level="layer"`.
        mix: what the site after a skipped layer reads, with AttnRes; only for `level="layer"`.
    """
    if level not in LEVELS:
        raise ValueError(f"level: {level!r} is not one of {', '.join(map(repr, LEVELS))}")
    if level == "layer":
        names = tuple(f"layer {index}" for index in range(probe.num_layers))
    else:
        names = tuple(sublayer.name for sublayer in probe.sublayers)

    def skipped(index: int) -> AbstractContextManager[None]:
        return probe.skip(index, slots=slots, mix=mix) if level == "layer" else skip_sublayer(probe, index)

    number = len(names)
    changes, ratios = (torch.zeros(number, number, dtype=torch.float64) for _ in range(2))
    sizes, counts = (torch.zeros(number, dtype=torch.float64) for _ in range(2))
    losses = torch.zeros(number + 1, dtype=torch.float64)
    for ids in text:
        found: dict[int, Tensor] = {}
        with probe.recorded() as inputs:
            losses[-1] += _run(probe, ids, level, found.__setitem__)
        updates = [found[index] for index in range(number)]
        norms = [update.norm(dim=-1) for update in updates]  # [B, T] each
        sizes += torch.stack([norm.sum().double().cpu() for norm in norms])
        counts += torch.tensor([(norm > 0).sum().item() for norm in norms])
        for s in range(number):
            compare = _Comparison(s, updates, norms)
            with skipped(s), probe.resumed_at(s if level == "layer" else probe.sublayers[s].layer, inputs):
                losses[s] += _run(probe, ids, level, compare)
            changes[s] += torch.tensor(compare.changes, dtype=torch.float64)
            ratios[s] += torch.tensor(compare.ratios, dtype=torch.float64)
    upper = torch.ones(number, number, dtype=torch.bool).triu(1)
    scores = torch.where(upper, changes / sizes, torch.nan)
    token_scores = torch.where(upper, ratios / counts, torch.nan)
    return CausalScores(
        level=level,
        names=names,
        scores=scores,
        token_scores=token_scores,
        per_skipped=scores.nanmean(dim=1),
        mean=scores.nanmean().item(),
        token_mean=token_scores.nanmean().item(),
        loss_increase=(losses[:-1] - losses[-1]) / (text.num_sequences * (text.sequence_length - 1)),
        slots=str(SlotSkip(slots)),
        mix=str(MixSkip(mix)),
    )


class _Comparison:
    """Accumulates the changes of u_{s+1}, u_{s+2}, ... in a run with s skipped."""

    def __init__(self, s: int, updates: list[Tensor], norms: list[Tensor]):
        self.s, self.updates, self.norms = s, updates, norms
        self.changes = [0.0] * len(updates)
        self.ratios = [0.0] * len(updates)

    def __call__(self, later: int, update: Tensor) -> None:
        if later > self.s:
            difference = (update - self.updates[later]).norm(dim=-1)  # [B, T]
            self.changes[later] = difference.sum().item()
            norms = self.norms[later]
            self.ratios[later] = torch.where(norms > 0, difference / norms, 0.0).sum().item()


def _run(probe: DepthProbe, ids: Tensor, level: str, callback: Callable[[int, Tensor], None]) -> float:
    """Run one forward pass that passes l and u_l [B, T, D] to `callback`; return the summed loss of the batch."""
    before: dict[int, Tensor] = {}

    def see(index: int, state: Tensor) -> None:
        state = _wide(state)
        # A pass resumed at a later layer has no state before its first layer.
        if index - 1 in before:
            callback(index - 1, state - before.pop(index - 1))
        before[index] = state

    if level == "layer":
        observed = probe.observe_states(see)
    else:
        numbers = {sublayer: number for number, sublayer in enumerate(probe.sublayers)}
        observed = probe.observe_sublayers(lambda sublayer, x, y: callback(numbers[sublayer], _wide(y)))
    with observed:
        return token_losses(probe.logits(ids), ids).double().sum().item()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


METRICS = {
    "causal_scores": DepthMetric(causal_scores, lambda probe: 1.2 + 0.6 * probe.num_layers, True),
    "causal_scores_sublayer": DepthMetric(
        partial(causal_scores, level="sublayer"),
        lambda probe: 1.2 + 1.2 * probe.num_layers,
        False,
        lambda probe: probe.knows_sublayers,
    ),
}
