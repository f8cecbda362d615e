"""Jacobian identity gap: distance of a layer's Jacobian from the identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attn_res_reads import DEPTH_READS
from ...connection_base import DepthSite
from .probing.interventions import attribute, first_argument, right_boundary
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.text import TextBatches


@dataclass(frozen=True, eq=False, kw_only=True)
class JacobianGap(MetricResult):
    """Result of `jacobian_gap`.

    Attributes:
        jacobian_identity_gap: [L], gap of each layer.
        mean_jacobian_identity_gap: [L], a different quantity, see `jacobian_gap`. NaN with `include_mean=False`.
        relative_errors: [L], relative standard error of `jacobian_identity_gap` over random vectors and batches.
        num_probes: number of random vectors per layer and batch.
        seed: seed of the random vectors.
    """

    jacobian_identity_gap: Tensor
    mean_jacobian_identity_gap: Tensor
    relative_errors: Tensor
    num_probes: int
    seed: int


@depth_metric
def jacobian_gap(
    probe: DepthProbe, text: TextBatches, *, num_probes: int = 4, include_mean: bool = True, seed: int = 0
) -> JacobianGap:
    """Estimate the distance of each layer's Jacobian from the identity (CoD-S, arXiv 2603.15389).

    Uses Hutchinson's estimator:

        J = d z_{l+1} / d z_l over all tokens of a sequence, [T D, T D]
        jacobian_identity_gap      = sqrt(mean over sequences of ||J - I||_F^2 / (T D^2))
        mean_jacobian_identity_gap = ||Jm - I||_F / D,   Jm = mean_t sum_t' d z_{l+1, t'} / d z_{l, t}

    The second form is that of CoD-S's released code. It sums over the receiving tokens t' and averages over t before
    taking the norm, so differences between tokens cancel and effects common to many tokens add up. Either form can be
    the larger one. DepthBench divides by sqrt(D) instead of D.

    For u with random signs, E ||J^T u - u||^2 = ||J - I||_F^2. The vector-Jacobian product replaces a Jacobian-vector
    product, since attention kernels and custom ops only have a backward pass. For the mean form, u is the same at
    every token. Only one layer is differentiated at a time, so memory is that of one layer.

    With AttnRes, z_{l+1} is differentiated with respect to the newest source at the layer's input (the open block),
    which in a residual model is the stream itself; both agree for zero queries with `read_scale="sum"`. This
    convention is ours, since CoD-S only covers residual models. With n streams, D is their common width n D. MoDA
    slots of earlier layers are held fixed.

    In bfloat16, rounding alone causes a gap of about 0.002 / sqrt(D).

    Args:
        probe: the model.
        text: the text.
        num_probes: number of random vectors per layer and batch; the error falls with its square root.
        include_mean: also estimate the mean form, which doubles the number of backward passes.
        seed: seed of the random vectors.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes: {num_probes} must be at least 1")
    layers = [_LayerGap(seed * 1009 + index, num_probes, include_mean) for index in range(probe.num_layers)]

    def see(index: int, source: Tensor, output: Tensor) -> None:
        probe.num_backwards += layers[index].add(source, output) / probe.num_layers

    with _differentiated_layers(probe, see):
        for ids in text:
            probe.logits(ids)
    estimates = [layer.estimate() for layer in layers]
    gaps, means, errors = (torch.tensor(column, dtype=torch.float64) for column in zip(*estimates, strict=True))
    return JacobianGap(
        jacobian_identity_gap=gaps,
        mean_jacobian_identity_gap=means,
        relative_errors=errors,
        num_probes=num_probes,
        seed=seed,
    )


class _LayerGap:
    """Accumulates the estimates of one layer."""

    def __init__(self, seed: int, num_probes: int, include_mean: bool):
        self.generator = torch.Generator().manual_seed(seed)
        self.mean_seed = seed
        self.num_probes = num_probes
        self.include_mean = include_mean
        # ||J^T u - u||^2 per token and pair of channels, and the number of tokens.
        self.squares: list[float] = []
        self.weights: list[int] = []
        self.mean_products: Tensor | None = None
        self.mean_signs: Tensor | None = None
        self.num_tokens = 0

    def add(self, source: Tensor, output: Tensor) -> int:
        """Add one batch; return the number of backward passes through the layer.

        Args:
            source: [B, T, D], input of the Jacobian.
            output: [B, T, D], z_{l+1}.
        """
        num_tokens, width = source[..., 0].numel(), source.shape[-1]
        for _ in range(self.num_probes):
            signs = _signs(source.shape, self.generator).to(source)
            difference = _product(output, source, signs) - signs.to(torch.float64)
            self.squares.append(difference.square().sum().item() / (num_tokens * width**2))
            self.weights.append(num_tokens)
        self.num_tokens += num_tokens
        if not self.include_mean:
            return self.num_probes
        if self.mean_signs is None or self.mean_products is None:
            # Use the same vectors in all batches: the mean over tokens is taken before the norm.
            self.mean_signs = _signs((self.num_probes, width), torch.Generator().manual_seed(self.mean_seed))
            self.mean_products = torch.zeros(self.num_probes, width, dtype=torch.float64)
        for row, signs in enumerate(self.mean_signs):
            product = _product(output, source, signs.to(source).expand_as(source))
            self.mean_products[row] += product.sum(dim=(0, 1)).cpu()
        return 2 * self.num_probes

    def estimate(self) -> tuple[float, float, float]:
        """Return the gap, the gap of the mean form, and the relative standard error of the former."""
        squares = torch.tensor(self.squares, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64) / sum(self.weights)
        square = (weights * squares).sum()
        mean_gap = error = torch.tensor(math.nan)
        if len(squares) > 1:
            # The relative error of a square root is half that of the square.
            error = squares.std() / math.sqrt(len(squares)) / (2 * square)
        if self.mean_signs is not None and self.mean_products is not None:
            width = self.mean_signs.shape[1]
            difference = self.mean_products / self.num_tokens - self.mean_signs.double()
            mean_gap = difference.square().sum(dim=-1).mean().sqrt() / width
        return square.sqrt().item(), mean_gap.item(), error.item()


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw random signs, on the CPU so that a seed gives the same signs on every device."""
    return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.float32) * 2 - 1


def _product(output: Tensor, source: Tensor, vector: Tensor) -> Tensor:
    """Return `J^T vector` in float64; `vector` has the dtype of the source, which may differ from the output's."""
    (product,) = torch.autograd.grad(output, source, vector.to(output.dtype), retain_graph=True)
    return product.double()


@contextmanager
def _differentiated_layers(probe: DepthProbe, callback: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Rerun every layer with a graph from its newest source to z_{l+1}, for `callback(l, source, z)`."""

    def hook_of(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
            given = first_argument(args, kwargs)
            with ExitStack() as stack, torch.enable_grad():
                ends: list[Any] = []
                if probe.has_streams:
                    stack.enter_context(_from_streams_to_streams(layer, ends))
                    given = cast(DepthSite, layer.attn_depth).begin(given) if isinstance(given, Tensor) else given
                # Check the fields, not the class: remote code has its own `DepthState`.
                carries_state = hasattr(given, "partial")
                if carries_state:
                    given = given.settled()
                stream = given.partial.flatten(2) if carries_state else given
                source = stream.detach().requires_grad_()
                streams = source.unflatten(2, given.partial.shape[2:]) if carries_state else source
                replaced = given._replace(partial=streams) if carries_state else source
                # Call `forward` directly: hooks, including this one, must only run in the model's own call.
                if args:
                    output = layer.forward(replaced, *args[1:], **kwargs)
                else:
                    output = layer.forward(**{**kwargs, "hidden_states": replaced})
                output = ends[0] if ends else output
                if hasattr(output, "partial"):
                    site = right_boundary(probe.layers, index)
                    reads = kwargs.get(DEPTH_READS)
                    output = output.partial.flatten(2) if probe.has_streams else site(output, reads)
                callback(index, source, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(probe.layers):
            stack.enter_context(layer.register_forward_hook(hook_of(index), with_kwargs=True))
        yield


@contextmanager
def _from_streams_to_streams(layer: nn.Module, ends: list[Any]) -> Iterator[None]:
    """Let the first layer take a state, and append the state before the output site in the last layer to `ends`."""
    with ExitStack() as stack:
        stack.enter_context(attribute(layer, "is_first", False))
        if layer.out_depth is not None:
            site = cast(nn.Module, layer.out_depth)
            stack.enter_context(site.register_forward_pre_hook(lambda site, args: ends.append(args[0])))
        yield


METRICS = {"jacobian_gap": DepthMetric(jacobian_gap, lambda probe: 18.0, False)}
