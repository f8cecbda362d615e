"""Small networks of depth sites without a host, for comparing connections with references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tiny_hosts import tiny_host_config
from torch import Tensor, nn

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import depth_site

Sublayer = Callable[[Tensor], Tensor]


def wave(*shape: int, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return fixed numbers between -scale and scale in float64, for golden values."""
    count = torch.Size(shape).numel()
    return scale * torch.sin(1.7 * torch.arange(count, dtype=torch.float64) + phase).view(shape)


def site_config(width: int, num_layers: int, **fields) -> DepthAttnConfig:
    """Build the config of a network of `2 * num_layers` sublayers."""
    host = tiny_host_config("llama", hidden_size=width, num_hidden_layers=num_layers, num_attention_heads=1)
    return DepthAttnConfig(text_config=host, **fields)


def initial_sites(config: DepthAttnConfig) -> nn.ModuleList:
    """Build all sites with their initial parameters."""
    from transformers import initialization as init

    sites = nn.ModuleList(depth_site(config, s) for s in range(config.num_sublayers + 1))
    with torch.no_grad():
        for site in sites:
            site.init_parameters(init)
    return sites


def filled_sites(config: DepthAttnConfig, scale: float = 0.8) -> nn.ModuleList:
    """Build all sites in float64 with fixed numbers in every parameter, unlike the initial ones."""
    sites = initial_sites(config).double()
    with torch.no_grad():
        for i, parameter in enumerate(sites.parameters()):
            parameter.copy_(wave(*parameter.shape, phase=0.3 * i, scale=scale))
    return sites


def linear_sublayers(width: int, count: int) -> nn.ModuleList:
    """Build sublayers `tanh(W h)` in float64 with fixed weights."""
    sublayers = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(count))
    sublayers.double()
    with torch.no_grad():
        for i, parameter in enumerate(sublayers.parameters()):
            parameter.copy_(wave(width, width, phase=1.1 * i, scale=1.0 / width**0.5))
    return sublayers


def run_sites(sites: nn.ModuleList, sublayers: Sequence[Sublayer], embeddings: Tensor) -> Tensor:
    """Return the output of a network: embeddings, then every sublayer with its site (no norms), the output site."""
    state = sites[0].begin(embeddings)
    for site, sublayer in zip(sites, sublayers, strict=False):
        h, state, weights = site(state)
        assert weights is None
        state = site.write(state, sublayer(site.enter(h)))
    return sites[len(sublayers)](state)[0]


def gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a fixed function of the output; zeros for inputs that it does not depend on."""
    found = torch.autograd.grad((output * wave(*output.shape, phase=0.9)).sum(), list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-10) -> None:
    """Assert that tensors agree, relative to the largest entry of each expected one."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * max(1e-3, e.abs().max().item()))
