"""x0 lambdas: the equation, where the scales are, and the host at the start."""

import pytest
import torch
from connection_cases import check_against, random_case
from model_checks import depth_model
from site_networks import run_sites
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model
from torch import nn

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import depth_site

# `GPT.forward` of nanochat (92d63d4) with blocks of two sublayers y = cos((s + 1) h + channel), without its other
# parts (norms, smear, backout): the input of its head, and the gradients of its sum.
R, X = (1.15, 1.1, 0.8), (0.2, -0.3, 0.05)
NANOCHAT = [
    [-0.961551782034194, -0.5497125615784357, -1.0881921679188933, -0.6313927905833072],
    [-0.28950503046917697, 1.6079147123144515, 1.3055031004620474, -0.9774372977875776],
]
GRADIENTS_OF_R = [5.6731101347398525, -26.264144066236227, 11.322345590488155]
GRADIENTS_OF_X = [5.6731101347398525, -16.06558649379101, -0.14378415977511594]


def test_forward_and_every_gradient_equal_the_equation():
    def reference(sites, embedding, sublayers):
        scales = [list(site.parameters()) for site in sites]
        of_layers = [pair for pair in scales if pair]
        assert [i for i, pair in enumerate(scales) if pair] == [0, 1, 3]
        stream = embedding
        for layer, (r, x) in enumerate(of_layers):
            stream = torch.stack([r[0] * h + x[0] * e for h, e in zip(stream, embedding, strict=True)])
            for sublayer in sublayers[2 * layer : 2 * layer + 2]:
                stream = stream + sublayer(stream)
        return stream

    check_against(reference, connection="x0_lambdas")


def test_values_and_gradients_are_those_of_nanochat():
    host = tiny_host_config("llama", hidden_size=4)
    config = DepthAttnConfig(text_config=host, connection="x0_lambdas")
    sites = nn.ModuleList(depth_site(config, site) for site in range(7)).double()
    mixes = [site.mix for site in sites if site.mix is not None]
    for mix, r, x in zip(mixes, R, X, strict=True):
        mix.stream_scale.data.fill_(r)
        mix.embedding_scale.data.fill_(x)
    embeddings = torch.arange(8, dtype=torch.float64).view(1, 2, 4) / 10
    sublayers = [lambda h, s=s: torch.cos((s + 1) * h + torch.arange(4)) for s in range(6)]
    actual = run_sites(sites, sublayers, embeddings)
    torch.testing.assert_close(actual, torch.tensor([NANOCHAT], dtype=torch.float64), rtol=1e-7, atol=1e-7)
    actual.sum().backward()
    torch.testing.assert_close([mix.stream_scale.grad.item() for mix in mixes], GRADIENTS_OF_R, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        [mix.embedding_scale.grad.item() for mix in mixes], GRADIENTS_OF_X, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_initial_scales_are_the_host_to_the_bit(dtype):
    stock, ids = tiny_stock_model("llama", dtype), random_ids(2, 9)
    assert torch.equal(depth_model(stock, connection="x0_lambdas")(ids).logits, stock(ids).logits)


def test_layers_share_one_embedding():
    """A state keeps the embedding itself, not copies of it."""
    model, seen = random_case("x0_lambdas"), []
    for layer in model.model.layers:
        layer.mlp_depth.register_forward_pre_hook(lambda _, args: seen.append(args[0].sources))
    model(random_ids(1, 5))
    assert len(seen) == 3 and all(sources[0] is seen[0][0] for sources in seen)
