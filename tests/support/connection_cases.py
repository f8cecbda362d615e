"""Every connection of the registry with the fields that it needs, for tests of whole models and of sites."""

from collections.abc import Callable, Sequence

import torch
from depth_forms import random_model
from site_networks import run_sites
from tiny_hosts import tiny_host_config
from torch import Tensor, nn

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.depth_connections import CONNECTIONS, depth_site

#: Connection -> further fields without which its config is refused.
_NEEDED = {"deepnorm": {"norm_position": "post"}}

#: Connection -> fields of a config with it.
FIELDS = {str(name): {"connection": str(name), **_NEEDED.get(name, {})} for name in CONNECTIONS}

#: The same alone and with MoDA.
CASES = FIELDS | {f"{name}, MoDA": fields | {"depth_kv": "attention+mlp"} for name, fields in FIELDS.items()}

#: Connections that compute what their host computes, with the options that `retrofit` sets.
STARTERS = [str(name) for name, kind in CONNECTIONS.items() if kind.starts_as_host]

D = 6


def random_case(case: str, model_type: str = "llama", **fields) -> DepthAttnForCausalLM:
    """Build a tiny model of a case with random depth parameters."""
    torch.manual_seed(0)
    return random_model(model_type, **CASES[case], **fields)


def check_against(reference: Callable[[nn.ModuleList, Tensor, Sequence[nn.Module]], Tensor], **fields) -> None:
    """Compare the sites of a connection, and every gradient, with a reference for one token in float64.

    Args:
        reference: function of the sites (for their parameters), the embedding `[D]` of one token, and the sublayers.
        **fields: fields of the config.
    """
    torch.manual_seed(0)
    host = tiny_host_config("llama", hidden_size=D, num_hidden_layers=3, num_attention_heads=2, head_dim=3)
    config = DepthAttnConfig(text_config=host, **fields)
    sites = nn.ModuleList(depth_site(config, site) for site in range(config.num_sublayers + 1)).double()
    with torch.no_grad():
        for parameter in sites.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.7)
    sublayers = [nn.Sequential(nn.Linear(D, D), nn.Tanh()).double() for _ in range(config.num_sublayers)]
    embeddings = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(embeddings)

    actual = run_sites(sites, sublayers, embeddings)
    tokens = [reference(sites, token, sublayers) for token in embeddings.flatten(0, 1)]
    expected = torch.stack(tokens).view_as(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    wanted = [embeddings, *nn.ModuleList(sublayers).parameters(), *sites.parameters()]
    gradients = torch.autograd.grad(actual, wanted, cotangent)
    for found, gradient in zip(gradients, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-11)
