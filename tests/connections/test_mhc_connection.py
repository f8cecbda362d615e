"""mHC against the implementation in transformers, and its constraints."""

from types import SimpleNamespace

import pytest
import torch
from model_checks import depth_model, relative_max_error
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


def transformers_network(sites, sublayers, embeddings):
    """The same network of `DeepseekV4HyperConnection`; returns its output and its modules."""
    model = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="needs a transformers with DeepSeek-V4"
    )
    n = sites[0].num_streams
    streams = embeddings.unsqueeze(2).expand(-1, -1, n, -1)
    modules = []
    for site, sublayer in zip(sites, sublayers, strict=False):
        ours = site.weights
        fields = {"hc_mult": n, "hc_sinkhorn_iters": ours.sinkhorn_iters, "hc_eps": 0.0}
        config = SimpleNamespace(**fields, rms_norm_eps=EPS, hidden_size=D)
        theirs = model.DeepseekV4HyperConnection(config).double()
        with torch.no_grad():
            theirs.fn.copy_(ours.proj)
            theirs.base.copy_(ours.base)
            theirs.scale.copy_(ours.scale)
        modules.append(theirs)
        post, comb, h = theirs(streams.contiguous())
        mixed = comb.transpose(-1, -2) @ streams
        streams = mixed + post.unsqueeze(-1) * sublayer(h).unsqueeze(-2)
    return streams.mean(-2), modules


@pytest.mark.parametrize("num_streams, iters", [(2, 20), (3, 1), (4, 3)])
def test_forward_and_every_gradient_equal_transformers(monkeypatch, num_streams, iters):
    # The module casts to float32; without that it computes in float64 here.
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    config = site_config(D, 3, connection="mhc", num_streams=num_streams, sinkhorn_iters=iters, depth_norm_eps=EPS)
    sites, sublayers = filled_sites(config), linear_sublayers(D, 6)
    embeddings = wave(2, 3, D, phase=0.2).requires_grad_()
    expected, modules = transformers_network(sites, sublayers, embeddings)
    actual = run_sites(sites, sublayers, embeddings)
    assert_all_close([actual], [expected], rtol=1e-12)
    ours = [p for site in sites[:-1] for p in (site.weights.proj, site.weights.base, site.weights.scale)]
    theirs = [p for module in modules for p in (module.fn, module.base, module.scale)]
    assert len(ours) == len(list(sites.parameters()))
    others = [embeddings, *sublayers.parameters()]
    assert_all_close(gradients(actual, [*others, *ours]), gradients(expected, [*others, *theirs]))


@pytest.mark.parametrize("num_streams", [2, 3, 4, 6])
@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_initial_model_is_its_host(model_type, num_streams):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, connection="mhc", num_streams=num_streams)
    ids = random_ids(2, 11)
    assert relative_max_error(model(ids).logits, stock(ids).logits) < 1e-5


def test_initial_gradients_differ_between_streams():
    """With equal weights of the read, streams would get equal gradients and stay equal for ever."""
    sites = initial_sites(site_config(D, 3, connection="mhc")).double()
    output = run_sites(sites, linear_sublayers(D, 6), wave(2, 3, D))
    gradient = gradients(output, [sites[0].weights.base])[0][4:8]
    assert gradient.std() > 0.1 * gradient.abs().mean()


def test_number_of_parameters_is_that_of_the_paper():
    counts = [
        sum(p.numel() for p in site.parameters()) for site in initial_sites(site_config(32, 2, connection="mhc"))
    ]
    assert counts == [(4 * 4 + 2 * 4) * (4 * 32 + 1) + 3] * 4 + [0]
