"""The depth-mixing matrix M: of which sources, with which factors, the input of every sublayer consists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...attn_res_reads import DEPTH_READS
from ...depth_state import Carried, DepthState
from .probing.interventions import attribute, first_argument, own_layers
from .probing.probe import DepthProbe
from .probing.results import DepthMetric, MetricResult, depth_metric
from .probing.source_coefficients import MixedTensor, coefficients_of
from .probing.text import TextBatches
from .weights import site_names

# Singular values above this share of the largest count for a rank.
_RANK_TOLERANCE = 1e-9
# Relative error of M V that is never one: norms of hosts compute in float32, also in float64 models.
_LEAST_ERROR = 1e-4
# Channels that differ by this share of the largest entry are the same.
_SAME = 1e-13
# Numbers (8 bytes each) in the coefficients of all sources of one state.
_MOST_NUMBERS = 1 << 25
# Channels whose matrices give the ranks, if channels differ.
_NUM_CHANNELS = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthMixing(MetricResult):
    """Result of `depth_mixing` for S = 2L + 1 sites and as many sources.

    Attributes:
        sites: S names of sites, the rows.
        sources: S names of sources, the columns: the embedding, and the output of every sublayer.
        means: [S, S], mean of M over tokens and channels; NaN above the diagonal.
        variances: [S, S], variance over tokens of the mean over channels; 0 if M does not depend on the token.
        effective_rank: exp of the entropy of the normalised singular values of M (Roy and Vetterli, 2007), mean over
            tokens.
        semiseparable_rank: largest rank of a block M[k:, :k + 1], the maximum over tokens.
        least_semiseparable_rank: its minimum over tokens.
        error: relative error of M V (and constants) against the inputs H of the sublayers in the model's dtype, in the
            L2 norm over all sites and tokens.
        num_tokens: number of tokens.
    """

    sites: tuple[str, ...]
    sources: tuple[str, ...]
    means: Tensor
    variances: Tensor
    effective_rank: float
    semiseparable_rank: int
    least_semiseparable_rank: int
    error: float
    num_tokens: int


@dataclass(frozen=True, eq=False)
class MixingMatrices:
    """The depth-mixing matrices of some tokens.

    Attributes:
        matrices: [tokens, S, S, channels] in float64; 1 channel if M is the same for all channels.
        error: relative error of M V, and constants, against H.
    """

    matrices: Tensor
    error: float


@depth_metric
def depth_mixing(probe: DepthProbe, text: TextBatches, *, num_tokens: int = 64) -> DepthMixing:
    """Measure the depth-mixing matrix of tokens spread over the text (AttnRes, arXiv 2603.15031).

        h_l = sum_i M_li v_i        v_0 the embedding, v_i the output of sublayer i - 1, h_l the input of sublayer l

    M of a residual model is lower triangular with ones; it is r-semiseparable if every block M[k:, :k + 1] has at most
    rank r, i.e. if a state of r tensors carries everything from one sublayer to the next. Factors that depend on the
    token (softmax weights, gates, norms) are those of the token. Learned vectors that are added or read like a source
    (the null source of `delta`) have no column. Where M differs between channels, ranks are the largest of a few
    channels.

    Args:
        probe: a model with depth attention.
        text: the text.
        num_tokens: number of tokens, at most those of the text.

    Raises:
        ValueError: for a stock model, or if the inputs of sublayers are not such sums.
    """
    num_tokens = min(num_tokens, text.num_tokens)
    chosen = torch.arange(num_tokens) * text.num_tokens // num_tokens
    found, errors, start = [], [], 0
    for ids in text:
        local = chosen[(chosen >= start) & (chosen < start + ids.numel())] - start
        start += ids.numel()
        if len(local):
            part = mixing_matrices(probe, ids, local)
            found.append(part.matrices)
            errors.append((part.error, len(local)))
    num_channels = max(part.shape[-1] for part in found)
    matrices = torch.cat([part.expand(*part.shape[:-1], num_channels) for part in found])
    of_tokens = matrices.mean(-1)
    above = torch.ones(of_tokens.shape[1:], dtype=torch.bool).triu(1)
    each = matrices[..., torch.linspace(0, num_channels - 1, min(num_channels, _NUM_CHANNELS)).long().unique()]
    ranks = torch.stack([semiseparable_rank(matrix) for matrix in each.unbind(-1)]).amax(0)
    return DepthMixing(
        sites=tuple(site_names(probe.num_layers)),
        sources=("emb.", *site_names(probe.num_layers)[:-1]),
        means=of_tokens.mean(0).masked_fill(above, torch.nan),
        variances=of_tokens.var(0, correction=0).masked_fill(above, torch.nan),
        effective_rank=effective_rank(of_tokens).mean().item(),
        semiseparable_rank=int(ranks.max()),
        least_semiseparable_rank=int(ranks.min()),
        error=(sum(error**2 * count for error, count in errors) / num_tokens) ** 0.5,
        num_tokens=num_tokens,
    )


def mixing_matrices(probe: DepthProbe, ids: Tensor, tokens: Tensor | None = None) -> MixingMatrices:
    """Return the depth-mixing matrices of the tokens of one batch, from one forward pass.

    The sites then run again on the recorded embeddings and sublayer outputs, as tensors that know their coefficients.

    Args:
        probe: a model with depth attention, in eval mode.
        ids: token ids, [B, T].
        tokens: indices of tokens in the flattened batch; all by default.

    Raises:
        ValueError: for a stock model, or if M V differs from H.
    """
    if not probe.has_depth_sites:
        raise ValueError("model: a stock model has no depth sites; use a model with depth attention")
    tokens = torch.arange(ids.numel()) if tokens is None else tokens
    with torch.no_grad():
        with _recorded(probe, tokens) as record:
            probe.logits(ids)
        sources, inputs = (torch.stack(rows, 2) for rows in (record.sources, record.inputs))  # [1, tokens, S, D]
        size = max(1, _MOST_NUMBERS // (sources.shape[2] ** 2 * sources.shape[-1]))
        parts = [
            torch.stack(_rows(probe, part.unbind(2), record.reads), 2)  # [tokens, source or constant, site, D]
            for part in sources.split(size, 1)
        ]
    coefficients, constants = torch.cat(parts).cpu().split([sources.shape[2], 1], 1)
    found = (coefficients * sources[0].double().cpu().unsqueeze(2)).sum(1) + constants[:, 0]
    expected = inputs[0].double().cpu()
    error = ((found - expected).norm() / expected.norm()).item()
    if error > max(_LEAST_ERROR, torch.finfo(sources.dtype).eps ** 0.5):
        raise ValueError(
            f"connection: the sublayers of a {probe.family!r} model read something else than sums of sources per "
            f"channel (relative error {error:.1e}); norms of the residual stream must be RMSNorms"
        )
    matrices = coefficients.transpose(1, 2)
    # Products of matrices round differently between channels.
    if (matrices - matrices[..., :1]).abs().max() <= _SAME * matrices.abs().max():
        matrices = matrices[..., :1]
    return MixingMatrices(matrices, error)


def effective_rank(matrices: Tensor) -> Tensor:
    """Return the effective ranks of matrices [..., S, S], exp of the entropy of the normalised singular values."""
    values = torch.linalg.svdvals(matrices)
    ranks: Tensor = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()
    return ranks


def semiseparable_rank(matrices: Tensor) -> Tensor:
    """Return the largest rank of a block M[k:, :k + 1] of matrices [..., S, S], in float64."""
    ranks = []
    for k in range(matrices.shape[-1]):
        values = torch.linalg.svdvals(matrices[..., k:, : k + 1].double())
        ranks.append((values > _RANK_TOLERANCE * values[..., :1]).sum(-1))
    return torch.stack(ranks).amax(0)


class _Record:
    """What one forward pass computes: embeddings and sublayer outputs, what sites read, and the weights of reads.

    Attributes:
        sources: S tensors [1, tokens, D].
        inputs: S tensors [1, tokens, D].
        reads: the `ReadWeights` that the layers get, if any.
    """

    def __init__(self) -> None:
        self.sources: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.reads: Carried | None = None


@contextmanager
def _recorded(probe: DepthProbe, tokens: Tensor) -> Iterator[_Record]:
    record = _Record()

    def chosen(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[tokens.to(x.device)].unsqueeze(0)

    def see_embeddings(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.sources.append(chosen(first_argument(args, kwargs)))
        record.reads = kwargs.get(DEPTH_READS)

    def see_read(site: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        record.inputs.append(chosen(output[0]))

    def seen(write: Any) -> Any:
        def written(state: DepthState, output: Tensor) -> DepthState:
            record.sources.append(chosen(output))
            return cast(DepthState, write(state, output))

        return written

    with ExitStack() as stack:
        layers = own_layers(probe.layers)
        stack.enter_context(layers[0].register_forward_pre_hook(see_embeddings, with_kwargs=True))
        for layer in layers:
            for site in (layer.attn_depth, layer.mlp_depth):
                stack.enter_context(site.register_forward_hook(see_read))
                stack.enter_context(attribute(site, "write", seen(site.write)))
        stack.enter_context(layers[-1].out_depth.register_forward_hook(see_read))
        yield record


def _rows(probe: DepthProbe, values: tuple[Tensor, ...], reads: Carried | None) -> list[Tensor]:
    """Return S rows of coefficients, [tokens, S + 1, D] each, the constant last."""
    layers = own_layers(probe.layers)
    sources = (MixedTensor.source(value, index, len(values)) for index, value in enumerate(values))
    rows: list[Tensor] = []

    def read(site: Any, state: DepthState) -> DepthState:
        h, state, _ = site(state, reads)
        rows.append(coefficients_of(h)[:, 0].transpose(0, 1))
        return state

    with _plain_reads(layers[0].attn_depth):
        state = layers[0].attn_depth.begin(next(sources))
        for layer in layers:
            for site, sublayer in ((layer.attn_depth, layer.layout.attention), (layer.mlp_depth, layer.layout.mlp)):
                state = layer._write(site, sublayer, read(site, state), next(sources))
        read(layers[-1].out_depth, state)
    return rows


@contextmanager
def _plain_reads(site: nn.Module) -> Iterator[None]:
    """Let reads of AttnRes use the reference, whose operations are visible, instead of ops."""
    # Remote code has a registry of its own.
    package = type(site).__module__.rpartition(".")[0]
    registry = import_module(f"{package}.op_dispatch").OPS
    reference = import_module(f"{package}.attn_res_ops").attn_res_read_reference
    before = registry["attn_res_read"]
    registry["attn_res_read"] = replace(before, torch_impl=reference, triton_impl=None)
    try:
        yield
    finally:
        registry["attn_res_read"] = before


METRICS = {"depth_mixing": DepthMetric(depth_mixing, lambda probe: 1.5, True, lambda probe: probe.has_depth_sites)}
