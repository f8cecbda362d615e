"""Smaller initial weights of the projections into the residual stream, as GPT-2 has them."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..depth_layer import DepthAttnDecoderLayer
from ..errors import UserError
from ..utils.eval_mode import eval_mode

if TYPE_CHECKING:
    from ..modeling_depthattn import DepthAttnPreTrainedModel

# Enough for every kind of attention, and for some experts of a mixture.
_NUM_TOKENS = 16


def scale_outputs(model: DepthAttnPreTrainedModel, factor: float | None = None) -> list[str]:
    """Scale the projections into the residual stream of an untrained model, in place.

        W <- (2 L)^(-1/2) W        L decoder layers, each with two sublayers (GPT-2, section 2.3)

    With it, the sum of all 2 L outputs starts about as large as a single one. Scaled are the matrices from which
    sublayers get their outputs: those of attention or what replaces it, of MLPs, of all experts and of shared experts.
    Biases, MoDA's projections and the parameters of connections stay as they are. Every call scales again.

    Output projections are found by what they do, not by their names: each of their rows acts on one channel of a
    sublayer's output only. This takes one forward pass of 16 tokens, and draws no random numbers.

    Args:
        model: the model, as it was initialised; whole, not on the meta device.
        factor: the factor; `(2 * num_hidden_layers) ** -0.5` by default.

    Returns:
        The names of the scaled parameters, as in `model.named_parameters()`.

    Raises:
        UserError: if `factor` is not positive and finite, the host normalises outputs of sublayers before they are
            added, so that the scale would have no effect, a sublayer has no trainable output projection, or the model
            has no depth connections or no parameters with values here.
    """
    layers = [module for module in model.modules() if isinstance(module, DepthAttnDecoderLayer)]
    _check(model, layers, factor)
    if factor is None:
        factor = float((2 * len(layers)) ** -0.5)
    found: set[nn.Parameter] = set()
    with ExitStack() as hooks:
        for layer in layers:
            for module in (*layer.attention_modules, *layer.mlp_modules):
                hooks.enter_context(module.register_forward_pre_hook(_detached))
                hooks.enter_context(module.register_forward_hook(partial(_find, found, layer)))
        _run(model)
    with torch.no_grad():
        for parameter in found:
            parameter.mul_(factor)
    return [name for name, parameter in model.named_parameters() if parameter in found]


def _check(model: nn.Module, layers: list[DepthAttnDecoderLayer], factor: float | None) -> None:
    if factor is not None and not 0 < factor < math.inf:
        raise UserError(f"factor: {factor} must be greater than 0 and finite.")
    if not layers:
        raise UserError(
            f"model: {type(model).__name__} has no depth connections; for a baseline, use connection='residual'."
        )
    if any(parameter.is_meta or hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise UserError(f"model: parameters of {type(model).__name__} are sharded or on the meta device.")
    for layer in layers:
        for norm in (layer.layout.attention.post_norm, layer.layout.mlp.post_norm):
            if norm is not None and not isinstance(getattr(layer, norm), nn.Identity):
                raise UserError(
                    f"model: its host normalises outputs of sublayers ({norm}), so that smaller projections have no "
                    "effect."
                )


def _run(model: nn.Module) -> None:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(_NUM_TOKENS, device=embeddings.weight.device) % embeddings.num_embeddings
    with eval_mode(model), torch.enable_grad():
        model.base_model(input_ids=ids[None], use_cache=False)  # type: ignore[operator]


def _detached(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Layers may share parameters: what an earlier layer did with one is not to count.
    return (args[0].detach(), *args[1:])


def _find(
    found: set[nn.Parameter], layer: DepthAttnDecoderLayer, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    projections = _output_projections(module, output[0] if isinstance(output, tuple) else output)
    if not projections:
        raise UserError(
            f"model: {type(module).__name__} of layer {layer.layer_idx} has no trainable output projection, or "
            "normalises what it projects."
        )
    found.update(projections)


def _output_projections(module: nn.Module, output: Tensor) -> list[nn.Parameter]:
    """Return the matrices of a module, or stacked ones of experts, of which each row acts on one output channel.

    Args:
        module: the module of a sublayer.
        output: its output `[B, T, D]`.
    """
    # Stacked biases of experts have two dimensions too.
    candidates = [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and parameter.requires_grad and not name.endswith("bias")
    ]
    if not candidates:
        return []
    gradients = torch.autograd.grad(output[..., 0].sum(), candidates, retain_graph=True, allow_unused=True)
    return [
        parameter
        for parameter, gradient in zip(candidates, gradients, strict=True)
        if gradient is not None and _is_of_first_row(gradient, output.shape[-1])
    ]


def _is_of_first_row(gradient: Tensor, num_channels: int) -> bool:
    # torch's linear layers have outputs first `[D, n]`, experts may have them last `[E, n, D]`.
    for dim in (-2, -1):
        if gradient.shape[dim] == num_channels:
            first, others = gradient.split([1, num_channels - 1], dim)
            if first.any() and not others.any():
                return True
    return False
