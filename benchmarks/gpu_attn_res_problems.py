"""AttnRes inputs of the GPU suite: one read, and a stack of sublayers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_depthattn.connection_base import DepthSite


class ReadProblem:
    """Inputs of one read: N sources [1, T, D], a query, and the weight of the norm after the read."""

    def __init__(self, sources: list[Tensor], query: Tensor, norm_weight: Tensor, cotangents: list[Tensor]):
        self.sources, self.query, self.norm_weight, self.cotangents = sources, query, norm_weight, cotangents

    @staticmethod
    def make(setting: dict, dtype: torch.dtype, device: torch.device) -> ReadProblem:
        generator = torch.Generator(device).manual_seed(0)
        draw = _drawing(generator, device)
        shape = (1, setting["num_tokens"], setting["num_channels"])
        sources = [draw(*shape).to(dtype).requires_grad_() for _ in range(setting["num_sources"])]
        query, norm_weight = _vectors(draw, setting["num_channels"], dtype)
        return ReadProblem(sources, query, norm_weight, [draw(*shape).to(dtype)])

    def leaves(self) -> dict[str, list[Tensor]]:
        return {"sources": self.sources, "query": [self.query], "norm weight": [self.norm_weight]}

    def double(self) -> ReadProblem:
        return ReadProblem(*_doubles(self.sources, self.query, self.norm_weight, self.cotangents))


class StackProblem:
    """A stack of L sublayers and its output read.

    Attributes:
        embeddings: [1, T, D].
        queries: L + 1 tensors [D], float32 with values that are exact in bfloat16.
        norm_weights: L tensors [D].
        sublayers: L modules without parameters.
        block_size: number of sublayers per block.
    """

    def __init__(self, embeddings, queries, norm_weights, sublayers, block_size, cotangents):
        self.embeddings, self.queries, self.norm_weights = embeddings, queries, norm_weights
        self.sublayers, self.block_size, self.cotangents = sublayers, block_size, cotangents
        # Created on first use by the row that needs them.
        self.sites: list[DepthSite] | None = None

    @staticmethod
    def make(setting: dict, dtype: torch.dtype, device: torch.device) -> StackProblem:
        draw = _drawing(torch.Generator(device).manual_seed(0), device)
        num_channels, num_sublayers = setting["num_channels"], setting["num_sublayers"]
        shape = (1, setting["num_tokens"], num_channels)
        vectors = [_vectors(draw, num_channels, dtype) for _ in range(num_sublayers + 1)]
        if setting.get("identity_sublayers", True):
            sublayers: list[nn.Module] = [nn.Identity() for _ in range(num_sublayers)]
        else:
            sublayers = [ChannelScale(draw(num_channels).to(dtype)) for _ in range(num_sublayers)]
        return StackProblem(
            draw(*shape).to(dtype).requires_grad_(),
            [query for query, _ in vectors],
            [norm_weight for _, norm_weight in vectors[:-1]],
            sublayers,
            setting["block_size"],
            [draw(*shape).to(dtype)],
        )

    def leaves(self) -> dict[str, list[Tensor]]:
        return {"embeddings": [self.embeddings], "queries": self.queries, "norm weights": self.norm_weights}

    def double(self) -> StackProblem:
        sublayers = [ChannelScale(x.scale.double()) if isinstance(x, ChannelScale) else x for x in self.sublayers]
        embeddings, queries, norm_weights, cotangents = _doubles(
            self.embeddings, self.queries, self.norm_weights, self.cotangents
        )
        return StackProblem(embeddings, queries, norm_weights, sublayers, self.block_size, cotangents)


class ChannelScale(nn.Module):
    """A stand-in sublayer."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _drawing(generator: torch.Generator, device: torch.device) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def _vectors(draw: Callable[..., Tensor], num_channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a float32 query whose values are exact in 16 bits, as peers need, and a norm weight."""
    query = (draw(num_channels) * num_channels**-0.5).bfloat16().float().requires_grad_()
    return query, (1 + 0.1 * draw(num_channels)).bfloat16().to(dtype).requires_grad_()


def _doubles(*values):
    """Return float64 copies of tensors and lists of tensors; copies of leaves are leaves."""

    def double(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad)

    return tuple([double(x) for x in value] if isinstance(value, list) else double(value) for value in values)
