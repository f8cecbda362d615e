"""Gradient norms of layers, depth modules and sublayer outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .probing.interventions import is_depth_name
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches
from .probing.token_losses import token_losses


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientMagnitude(MetricResult):
    """Result of `gradient_magnitude`: L2 norms of the gradient of a batch's mean loss, averaged over batches.

    Attributes:
        layer_parameters: [L], with respect to all parameters of a layer except those of depth sites and MoDA.
        depth_parameters: [L], with respect to the parameters of a layer's AttnRes reads, depth sites and MoDA; NaN for
            layers without any.
        sublayer_names: names of the sublayers; empty for unsupported model types.
        sublayer_outputs: with respect to the output y of each sublayer, over all tokens of a batch.
        batch_tokens: tokens in a full batch, on which `sublayer_outputs` depends.
    """

    layer_parameters: Tensor
    depth_parameters: Tensor
    sublayer_names: tuple[str, ...]
    sublayer_outputs: Tensor
    batch_tokens: int


@depth_metric
def gradient_magnitude(probe: DepthProbe, text: TextBatches) -> GradientMagnitude:
    """Measure gradient norms per layer and per sublayer (AttnRes, arXiv 2603.15031, Fig. 5).

        G_l = mean over batches of ||d Loss / d theta_l||      g_s = mean over batches of ||d Loss / d y_s||

    The gradients are those of the given model on a fixed text, while papers plot the mean of the last training steps.
    Frozen parameters are included. Memory is that of a training step; `.grad` of the parameters is not modified.

    Args:
        probe: the model.
        text: the text.
    """
    names = tuple(sublayer.name for sublayer in probe.sublayers) if probe.knows_sublayers else ()
    parameters = [group for layer in probe.layers for group in _groups(layer)]
    of_reads = [] if probe.depth_reads is None else list(probe.depth_reads.parameters())
    parameter_norms = torch.zeros(len(parameters), dtype=torch.float64)
    output_norms = torch.zeros(len(names), dtype=torch.float64)
    outputs: list[Tensor] = []
    with torch.enable_grad(), _all_trainable([*parameters, of_reads]), _kept_outputs(probe, outputs):
        for ids in text:
            outputs.clear()
            loss = token_losses(probe.logits(ids), ids).mean()
            flat = [p for group in parameters for p in group]
            gradients = iter(torch.autograd.grad(loss, [*flat, *of_reads, *outputs], allow_unused=True))
            probe.num_backwards += 1
            found: list[list[Tensor | None]] = [[next(gradients) for _ in group] for group in parameters]
            for gradient in islice(gradients, len(of_reads)):
                for depth, rows in zip(found[1::2], _rows_of_layers(gradient), strict=True):
                    depth.append(rows)
            parameter_norms += torch.stack([_norm(group) for group in found])
            output_norms += torch.tensor([_norm([gradient]).item() for gradient in gradients], dtype=torch.float64)
    # y = scale * output, so dLoss/dy = dLoss/doutput / scale.
    if names:
        output_norms /= torch.tensor([sublayer.scale for sublayer in probe.sublayers], dtype=torch.float64)
    # Columns alternate between a layer's own parameters and its depth parameters.
    layer_norms, depth_norms = (parameter_norms / len(text)).view(-1, 2).unbind(dim=1)
    has_depth = torch.tensor([bool(group or of_reads) for group in parameters[1::2]])
    return GradientMagnitude(
        layer_parameters=layer_norms,
        depth_parameters=depth_norms.masked_fill(~has_depth, torch.nan),
        sublayer_names=names,
        sublayer_outputs=output_norms / len(text),
        batch_tokens=min(text.batch_size, text.num_sequences) * text.sequence_length,
    )


def _groups(layer: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    named = [(name, p) for name, p in layer.named_parameters() if p.is_floating_point()]
    own, depth = ([p for name, p in named if is_depth_name(name) == depth] for depth in (False, True))
    return own, depth


def _rows_of_layers(gradient: Tensor) -> list[Tensor]:
    """Split the gradient of a parameter of the reads by layer; the output site counts as part of the last layer."""
    *others, last, output = gradient.split(2)
    return [*others, torch.cat([last, output])]


def _norm(gradients: list[Tensor | None]) -> Tensor:
    squares = [g.double().square().sum().cpu() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


@contextmanager
def _all_trainable(parameters: list[list[nn.Parameter]]) -> Iterator[None]:
    frozen = [p for group in parameters for p in group if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _kept_outputs(probe: DepthProbe, outputs: list[Tensor]) -> Iterator[None]:
    """Append the outputs of every sublayer's output module, with their graph, to `outputs`."""
    handles = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    try:
        if probe.knows_sublayers:
            handles += [sublayer.output_module.register_forward_hook(keep) for sublayer in probe.sublayers]
        yield
    finally:
        for handle in handles:
            handle.remove()


METRICS = {"gradient_magnitude": DepthMetric(gradient_magnitude, lambda probe: 3.0, True)}
