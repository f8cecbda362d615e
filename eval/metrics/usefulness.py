"""Usefulness: layers or sublayers that cannot be replaced by an affine map."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .probing.interventions import SlotSkip
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches

LEVELS = ("auto", "layer", "sublayer")


@dataclass(frozen=True, eq=False, kw_only=True)
class Usefulness(MetricResult):
    """Result of `usefulness` for n layers or sublayers.

    Attributes:
        level: `"layer"` or `"sublayer"`.
        names: n names of layers or sublayers.
        ratios: [n], loss with the affine map / loss of the model.
        increments: [n], difference of the two losses in nats.
        is_useful: n booleans, whether the ratio exceeds the threshold.
        score: U, the fraction that is useful.
        mean_ratio: mean of `ratios`.
        loss: loss of the model on the scored half.
        threshold: ratio above which a layer counts as useful.
        ridge: regulariser of the fit, in units of the mean diagonal of X^T X.
        num_fit_tokens: number of tokens in the least-squares fit.
        num_unknowns: D + 1 unknowns per output channel; with fewer fitted tokens the ridge dominates the result.
        num_scored_tokens: number of tokens in the scored half.
    """

    level: str
    names: tuple[str, ...]
    ratios: Tensor
    increments: Tensor
    is_useful: tuple[bool, ...]
    score: float
    mean_ratio: float
    loss: float
    threshold: float
    ridge: float
    num_fit_tokens: int
    num_unknowns: int
    num_scored_tokens: int


@depth_metric
def usefulness(
    probe: DepthProbe,
    text: TextBatches,
    *,
    level: str = "auto",
    threshold: float = 1.1,
    ridge: float = 1e-6,
    slots: SlotSkip = SlotSkip.ZERO,
) -> Usefulness:
    """Measure the loss when an affine map, fitted on held-out text, replaces a layer (CoD-S, arXiv 2603.15389).

        W_l = argmin_W ||[x 1] W - y||^2       ratio_l = Loss(l replaced by W_l) / Loss       U = #(ratio > 1.1) / n

    `level="layer"` maps z_l to z_{l+1} (only where layers pass on streams, not sources); `"sublayer"` maps a
    sublayer's input h to its output y and works for all families; `"auto"` uses layers where possible. The two levels
    are not comparable. CoD-S fits and scores on the same tokens, which favours the map if there are few tokens
    relative to D; here every other sequence is used for the fit and the rest for scoring.

    Args:
        probe: the model.
        text: at least two sequences.
        level: `"auto"`, `"layer"` or `"sublayer"`.
        threshold: ratio above which a layer counts as useful.
        ridge: added to the diagonal of X^T X, in units of its mean.
        slots: with MoDA and `level="layer"`, how later layers see the slots of the replaced layer.
    """
    if level not in LEVELS:
        raise ValueError(f"level: {level!r} is not one of {', '.join(map(repr, LEVELS))}")
    if level == "auto":
        level = "layer" if probe.maps_states else "sublayer"
    if level == "layer":
        probe.check_maps_states()
    to_fit, to_score = text.halves()
    if level == "layer":
        names = tuple(f"layer {index}" for index in range(probe.num_layers))
        maps = _fit_layers(probe, to_fit, ridge)
    else:
        names = tuple(sublayer.name for sublayer in probe.sublayers)
        maps = _fit_sublayers(probe, to_fit, ridge)

    def replaced(index: int) -> AbstractContextManager[None]:
        if level == "layer":
            return probe.replace_layer(index, maps[index], slots=slots)
        return probe.replace_sublayer(probe.sublayers[index], maps[index])

    first = range(probe.num_layers) if level == "layer" else [sublayer.layer for sublayer in probe.sublayers]
    loss, changed = probe.losses(to_score, [(first[index], partial(replaced, index)) for index in range(len(names))])
    losses = torch.tensor(changed, dtype=torch.float64)
    ratios = losses / loss
    is_useful = tuple((ratios > threshold).tolist())
    return Usefulness(
        level=level,
        names=names,
        ratios=ratios,
        increments=losses - loss,
        is_useful=is_useful,
        score=sum(is_useful) / len(names) if not ratios.isnan().any() else torch.nan,
        mean_ratio=ratios.mean().item(),
        loss=loss,
        threshold=threshold,
        ridge=ridge,
        num_fit_tokens=to_fit.num_tokens,
        num_unknowns=maps[0].num_unknowns,
        num_scored_tokens=to_score.num_tokens,
    )


class AffineFit:
    """Normal equations of an affine map in float64, accumulated over batches.

    Memory: (D + 1)^2 + (D + 1) D numbers, independent of the number of tokens.
    """

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.moments: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs and outputs, [B, T, D] each."""
        rows = torch.nn.functional.pad(x.double().flatten(0, 1), (0, 1), value=1.0)  # [B * T, D + 1]
        gram, moments = rows.T @ rows, rows.T @ y.double().flatten(0, 1)
        self.gram = gram if self.gram is None else self.gram + gram
        self.moments = moments if self.moments is None else self.moments + moments

    def solve(self, ridge: float) -> AffineMap:
        """Solve for the map; `ridge` is in units of the mean diagonal."""
        assert self.gram is not None and self.moments is not None, "rows have been added"
        diagonal = self.gram.diagonal()
        # For states that are all zero, the floor gives a zero map instead of a singular matrix.
        size = (ridge * diagonal.mean()).clamp_min(torch.finfo(torch.float64).tiny)
        gram = self.gram + size * torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
        return AffineMap(torch.linalg.solve(gram, self.moments))


class AffineMap:
    """Affine map `x -> [x 1] W`, in at least float32.

    Args:
        weight: [D + 1, D], the bias in its last row.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.num_unknowns = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide)
        return torch.addmm(weight[-1], x.to(wide).flatten(0, -2), weight[:-1]).view(x.shape).to(x.dtype)


def _fit_layers(probe: DepthProbe, text: TextBatches, ridge: float) -> list[AffineMap]:
    fits = [AffineFit() for _ in range(probe.num_layers)]
    before: list[Tensor] = []

    def see(index: int, state: Tensor) -> None:
        if index:
            fits[index - 1].add(before[0], state)
        before[:] = [state]

    with probe.observe_states(see):
        for ids in text:
            probe.logits(ids)
    return [fit.solve(ridge) for fit in fits]


def _fit_sublayers(probe: DepthProbe, text: TextBatches, ridge: float) -> list[AffineMap]:
    fits = {sublayer: AffineFit() for sublayer in probe.sublayers}
    with probe.observe_sublayers(lambda sublayer, x, y: fits[sublayer].add(x, y)):
        for ids in text:
            probe.logits(ids)
    return [fit.solve(ridge) for fit in fits.values()]


# One half of the text is used for the fit and the other for scoring.
METRICS = {
    "usefulness_layer": DepthMetric(
        partial(usefulness, level="layer"),
        lambda probe: 2 + 0.25 * probe.num_layers,
        True,
        lambda probe: probe.maps_states,
    ),
    "usefulness_sublayer": DepthMetric(
        partial(usefulness, level="sublayer"),
        lambda probe: 3 + 0.5 * probe.num_layers,
        True,
        lambda probe: probe.knows_sublayers,
    ),
}
