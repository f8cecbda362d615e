"""Hyper-Connections against the implementation on PyPI, and as the host at the start."""

import pytest
import torch
from model_checks import depth_model
from site_networks import (
    assert_all_close,
    filled_sites,
    gradients,
    initial_sites,
    linear_sublayers,
    run_sites,
    site_config,
    wave,
)
from tiny_hosts import random_ids, tiny_stock_model

D = 7
EPS = 1e-3  # large, so that its place in the formula shows


def public_network(sites, sublayers, embeddings):
    """The same network of `hyper_connections.HyperConnections`; returns its output and its parameters in our order.

    The package has an RMSNorm where the paper has a LayerNorm, and sums the streams where we take their mean.
    """
    package = pytest.importorskip(
        "hyper_connections.hyper_connections", reason="needs hyper-connections (extra `dev`)"
    )
    n = sites[0].num_streams
    expand, reduce = package.get_expand_reduce_stream_functions(n)
    streams, ordered = expand(embeddings), []
    for site, sublayer in zip(sites, sublayers, strict=False):
        ours = site.weights
        theirs = package.HyperConnections(n, dim=D, layer_index=site.site).double()
        theirs.norm = torch.nn.LayerNorm(D, eps=EPS, dtype=torch.float64)
        with torch.no_grad():
            theirs.static_alpha.copy_(ours.mixing)
            theirs.static_beta.copy_(ours.post)
            if ours.is_dynamic:
                theirs.norm.weight.copy_(ours.norm_weight)
                theirs.norm.bias.copy_(ours.norm_bias)
                theirs.dynamic_alpha_fn.copy_(ours.proj[:-1].t())
                theirs.dynamic_beta_fn.copy_(ours.proj[-1])
                theirs.dynamic_alpha_scale.copy_(ours.scale[0])
                theirs.dynamic_beta_scale.copy_(ours.scale[1])
        ordered.append(theirs)
        h, add = theirs(streams)
        streams = add(sublayer(h))
    return reduce(streams) / n, ordered


def public_gradients(output, modules, embeddings, sublayers, is_dynamic):
    """The gradients of `public_network` in the order and the shapes of our parameters."""
    found = []
    for theirs in modules:
        wanted = [theirs.static_alpha, theirs.static_beta]
        if is_dynamic:
            wanted += [theirs.dynamic_alpha_fn, theirs.dynamic_beta_fn]
            wanted += [theirs.dynamic_alpha_scale, theirs.dynamic_beta_scale, theirs.norm.weight, theirs.norm.bias]
        found.append(wanted)
    flat = gradients(output, [embeddings, *sublayers.parameters(), *(p for wanted in found for p in wanted)])
    first = 1 + len(list(sublayers.parameters()))
    named = []
    for wanted in found:
        own, first = flat[first : first + len(wanted)], first + len(wanted)
        named.append({"weights.mixing": own[0], "weights.post": own[1]})
        if is_dynamic:
            named[-1]["weights.proj"] = torch.cat([own[2], own[3].unsqueeze(-1)], -1).t()
            named[-1]["weights.scale"] = torch.stack([own[4], own[5]])
            named[-1]["weights.norm_weight"], named[-1]["weights.norm_bias"] = own[6], own[7]
    return flat[: 1 + len(list(sublayers.parameters()))], named


@pytest.mark.parametrize("num_streams", [2, 3, 4])
@pytest.mark.parametrize("stream_mix", ["static", "dynamic"])
def test_forward_and_every_gradient_equal_the_public_code(stream_mix, num_streams):
    config = site_config(
        D,
        3,
        connection="hyper_connections",
        stream_mix=stream_mix,
        num_streams=num_streams,
        depth_norm_eps=EPS,
    )
    sites, sublayers = filled_sites(config), linear_sublayers(D, 6)
    embeddings = wave(2, 3, D, phase=0.2).requires_grad_()
    expected, modules = public_network(sites, sublayers, embeddings)
    actual = run_sites(sites, sublayers, embeddings)
    assert_all_close([actual], [expected], rtol=1e-12)
    of_network, of_sites = public_gradients(expected, modules, embeddings, sublayers, stream_mix == "dynamic")
    names = [list(dict(site.named_parameters())) for site in sites[:-1]]
    assert [set(own) for own in names] == [set(own) for own in of_sites]
    wanted = [of_sites[i][name] for i, own in enumerate(names) for name in own]
    found = gradients(actual, [embeddings, *sublayers.parameters(), *sites.parameters()])
    assert_all_close(found, [*of_network, *wanted])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_streams", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("stream_mix", ["static", "dynamic"])
def test_initial_streams_are_the_residual_stream_to_the_bit(stream_mix, num_streams, dtype):
    config = site_config(64, 3, connection="hyper_connections", stream_mix=stream_mix, num_streams=num_streams)
    sublayers = linear_sublayers(64, 6).to(dtype)
    embeddings = torch.randn(2, 33, 64).to(dtype)
    expected = embeddings
    for sublayer in sublayers:
        expected = expected + sublayer(expected)
    assert torch.equal(run_sites(initial_sites(config), sublayers, embeddings), expected)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2"])
def test_initial_model_is_its_host_to_the_bit(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, connection="hyper_connections", num_streams=3)
    ids = random_ids(2, 11)
    assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("stream_mix, extra", [("static", 0), ("dynamic", (4 + 4) * 32 + 2)])
def test_number_of_parameters_is_that_of_the_papers(stream_mix, extra):
    config = site_config(32, 2, connection="hyper_connections", stream_mix=stream_mix)
    counts = [sum(p.numel() for p in site.parameters()) for site in initial_sites(config)]
    assert counts == [4 * 4 + 2 * 4 + extra] * 4 + [0]
