"""Causal scores: how much later layers change what they do when one layer is skipped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .interventions import MixSkip, SlotSkip
from .probe import DepthProbe, token_losses
from .results import DepthMetric, MetricResult, depth_metric
from .source_drop import skip_sublayer
from .text import TextBatches

LEVELS = ("layer", "sublayer")


@dataclass(frozen=True, eq=False, kw_only=True)
class CausalScores(MetricResult):
    """What `causal_scores` measured, n layers or sublayers.

    Attributes:
        level: `"layer"` or `"sublayer"`.
        names: n names.
        scores: [n, n], row s skipped, column l; NaN for l <= s. Ratio of the mean norms (CoD-S).
        token_scores: [n, n], mean over tokens of the ratio of norms (DepthBench); tokens to which l adds nothing have
            no ratio and are left out.
        per_skipped: [n], mean of row s of `scores`; NaN for the last.
        mean: plain mean of the strict upper triangle of `scores`, which models of different depth may share.
        token_mean: that of `token_scores`.
        loss_increase: [n], loss with s skipped minus loss, in nats.
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
    """Effect of skipping s on what every later l adds (CoD-S, arXiv 2603.15389).

        C(s, l) = mean_t ||u'_l - u_l|| / mean_t ||u_l||,  l > s       u_l = z_{l+1} - z_l, u' with s skipped

    At `level="sublayer"` u_l is the sublayer's output y, and a skipped sublayer adds nothing: it is 0 in a residual
    sum, and with AttnRes a source that holds nothing else is taken out of the mixes, which are renormalised.

    The global score is the plain mean of the upper triangle. DepthBench (arXiv 2609.32534) divides by a further
    sqrt(L), after which depths cannot be compared.

    One batch keeps u of all layers: (L + 1) B T D numbers.

    Args:
        probe: the model.
        text: the text.
        level: `"layer"` or `"sublayer"`.
        slots: what later layers see of a skipped layer's MoDA slots; layers alone.
        mix: what the site behind a skipped layer reads, with AttnRes; layers alone.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
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
    """Takes u_0, u_1, ... of a run with s skipped, and sums what has changed in those after s."""

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
    """One forward pass that hands l and u_l [B, T, D] to `callback`; the summed loss of the batch."""
    before: dict[int, Tensor] = {}

    def see(index: int, state: Tensor) -> None:
        state = _wide(state)
        # A pass that begins at a later layer has no state before its first.
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
