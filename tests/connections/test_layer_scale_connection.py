"""LayerScale: the equation, a stock host with scaled projections, and the initial values of the paper."""

import pytest
import torch
from connection_cases import check_against, random_case
from model_checks import depth_model, relative_max_error
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model
from transformers import LlamaForCausalLM
from transformers import initialization as init

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import depth_site


def test_forward_and_every_gradient_equal_the_equation():
    def reference(sites, embedding, sublayers):
        stream = embedding
        for i, sublayer in enumerate(sublayers):
            (scale,) = sites[i].parameters()
            stream = stream + torch.diag(scale) @ sublayer(stream)
        return stream

    check_against(reference, connection="layer_scale")


def test_scales_are_those_of_the_rows_of_output_projections():
    """A stock Llama whose output projections have their rows multiplied by the scales is the oracle."""
    model = random_case("layer_scale").double()
    stock = LlamaForCausalLM(model.config.text_config).double().eval()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "_depth." not in name})
    with torch.no_grad():
        for layer, host_layer in zip(model.model.layers, stock.model.layers, strict=True):
            host_layer.self_attn.o_proj.weight *= layer.attn_depth.branch.scale[:, None]
            host_layer.mlp.down_proj.weight *= layer.mlp_depth.branch.scale[:, None]
        ids = random_ids(2, 9)
        assert relative_max_error(model(ids).logits, stock(ids).logits) < 1e-12


@pytest.mark.parametrize("num_layers, scale", [(1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (48, 1e-6)])
def test_initial_scales_are_those_of_the_paper(num_layers, scale):
    host = tiny_host_config("llama", num_hidden_layers=num_layers)
    for chosen, expected in ((None, scale), (0.5, 0.5)):
        config = DepthAttnConfig(text_config=host, connection="layer_scale", branch_scale_init=chosen)
        site = depth_site(config, 1)
        site.init_parameters(init)
        assert torch.equal(site.branch.scale, torch.full((32,), expected))
        assert not list(depth_site(config, config.num_sublayers).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scales_of_one_are_the_host_to_the_bit(dtype):
    stock, ids = tiny_stock_model("llama", dtype), random_ids(2, 9)
    model = depth_model(stock, connection="layer_scale", branch_scale_init=1.0)
    assert torch.equal(model(ids).logits, stock(ids).logits)
