"""KEEL: the equation with the exceptions of the first two sublayers, and the size of the initial stream."""

import torch
from connection_cases import D, check_against, random_case
from tiny_hosts import random_ids, tiny_host_config

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM

EPS = 1e-2  # large, so that its place in the formula shows


def test_forward_and_every_gradient_equal_the_equation():
    def reference(sites, embedding, sublayers):
        stream = embedding + sublayers[0](embedding)
        for i, sublayer in enumerate(sublayers[1:], start=1):
            (weight,) = sites[i].parameters()
            total = (1 if i == 1 else len(sublayers)) * stream + sublayer(stream)
            stream = weight * total / ((total * total).sum() / D + EPS).sqrt()
        return stream

    check_against(reference, connection="keel", depth_norm_eps=EPS)


def test_the_initial_stream_has_size_one_after_every_sublayer_but_the_first():
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), connection="keel")).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    sizes = []
    for layer in model.model.layers:
        for site in (layer.mlp_depth, layer.out_depth):
            if site is not None and site.site > 1:
                site.register_forward_hook(lambda _, __, output: sizes.append(output[0].square().mean(-1).sqrt()))
    model(random_ids(2, 9))
    assert len(sizes) == 3
    for size in sizes:
        torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=1e-3)


def test_half_precision_models_normalise_in_float32():
    model = random_case("keel").bfloat16()
    site = model.model.layers[1].mlp_depth
    state = site.begin(torch.randn(1, 2, 32, dtype=torch.bfloat16))
    output = torch.randn(1, 2, 32, dtype=torch.bfloat16)
    total = 6 * state.partial.float() + output.float()
    expected = site.norm.weight * total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(site.write(state, output).partial, expected.bfloat16())
