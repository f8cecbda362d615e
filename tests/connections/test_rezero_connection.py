"""ReZero: the equation, a stock host with scaled projections, and the two initial functions."""

import pytest
import torch
from connection_cases import check_against, random_case
from model_checks import depth_model, relative_max_error
from site_networks import run_sites
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.depth_connections import depth_site

# Three `RZTXEncoderLayer` of majumderb/rezero (e2c94a8) with sublayers y = cos((s + 1) h + channel): the output, and
# the gradients of its sum. The two sublayers of a layer share one scale there.
SCALES = (0.5, -0.25, 2.0)
RZTX = [
    [2.236542171725515, 0.6214976200599889, 2.5251243016349405, -0.07244762635276314],
    [2.970625699197925, -1.2178463376129682, 0.757932754959331, 1.358833642929202],
]
GRADIENTS = [-85.14497626184615, 11.531482410100022, 53.85785460642223]


def test_forward_and_every_gradient_equal_the_equation():
    def reference(sites, embedding, sublayers):
        stream = embedding
        for i, sublayer in enumerate(sublayers):
            (scale,) = sites[i].parameters()
            stream = torch.stack([x + scale[0] * y for x, y in zip(stream, sublayer(stream), strict=True)])
        return stream

    check_against(reference, connection="rezero")


def test_values_and_gradients_are_those_of_the_released_code():
    config = DepthAttnConfig(text_config=tiny_host_config("llama", hidden_size=4), connection="rezero")
    sites = nn.ModuleList(depth_site(config, site) for site in range(7)).double()
    for site in sites[:-1]:
        site.branch.scale.data.fill_(SCALES[site.site // 2])
    embeddings = torch.arange(8, dtype=torch.float64).view(1, 2, 4) / 10
    sublayers = [lambda h, s=s: torch.cos((s + 1) * h + torch.arange(4)) for s in range(6)]
    actual = run_sites(sites, sublayers, embeddings)
    torch.testing.assert_close(actual, torch.tensor([RZTX], dtype=torch.float64))
    actual.sum().backward()
    of_sites = [site.branch.scale.grad.item() for site in sites[:-1]]
    of_layers = [sum(of_sites[2 * layer : 2 * layer + 2]) for layer in range(3)]
    torch.testing.assert_close(of_layers, GRADIENTS)


def test_scales_are_those_of_output_projections():
    """A stock Llama whose output projections are multiplied by the scales is the oracle."""
    model = random_case("rezero").double()
    stock = LlamaForCausalLM(model.config.text_config).double().eval()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "_depth." not in name})
    with torch.no_grad():
        for layer, host_layer in zip(model.model.layers, stock.model.layers, strict=True):
            host_layer.self_attn.o_proj.weight *= layer.attn_depth.branch.scale
            host_layer.mlp.down_proj.weight *= layer.mlp_depth.branch.scale
        ids = random_ids(2, 9)
        assert relative_max_error(model(ids).logits, stock(ids).logits) < 1e-12


def test_initial_scales_of_the_paper_map_embeddings_to_the_head():
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), connection="rezero")).eval()
    ids = random_ids(2, 9)
    expected = model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scales_of_one_are_the_host_to_the_bit(dtype):
    stock, ids = tiny_stock_model("llama", dtype), random_ids(2, 9)
    model = depth_model(stock, connection="rezero", branch_scale_init=1)
    assert torch.equal(model(ids).logits, stock(ids).logits)
