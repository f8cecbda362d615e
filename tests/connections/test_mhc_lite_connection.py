"""mHC-lite against a slow reference in loops and golden values of the authors' code, and as the host at the start."""

import math
from itertools import permutations

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

D = 5
EPS = 1e-3  # large, so that its place in the formula shows


def slow_weights(ours, streams):
    """`pre`, `post` and the mixing matrix of one token, number by number; streams is a list of n vectors."""
    n = len(streams)
    x = torch.cat(streams)
    x = x / (sum(value * value for value in x) / len(x) + EPS).sqrt()
    logits = [sum(w * value for w, value in zip(row, x, strict=True)) for row in ours.proj]
    scales = [0] * n + [1] * n + [2] * math.factorial(n)
    logits = [ours.scale[k] * logit + b for k, logit, b in zip(scales, logits, ours.base, strict=True)]
    pre = [1 / (1 + (-logit).exp()) for logit in logits[:n]]
    post = [2 / (1 + (-logit).exp()) for logit in logits[n : 2 * n]]
    total = sum(logit.exp() for logit in logits[2 * n :])
    mixing = [[0.0] * n for _ in range(n)]
    for logit, order in zip(logits[2 * n :], permutations(range(n)), strict=True):
        for i, k in enumerate(order):
            mixing[i][k] = mixing[i][k] + logit.exp() / total
    return pre, post, mixing


def slow_network(sites, sublayers, embeddings):
    """Token by token and stream by stream."""
    n = sites[0].num_streams
    rows = []
    for token in embeddings.flatten(0, 1):
        streams = [token] * n
        for site, sublayer in zip(sites, sublayers, strict=False):
            pre, post, mixing = slow_weights(site.weights, streams)
            y = sublayer(sum(weight * stream for weight, stream in zip(pre, streams, strict=True)))
            streams = [sum(mixing[i][k] * streams[i] for i in range(n)) + post[k] * y for k in range(n)]
        rows.append(sum(streams) / n)
    return torch.stack(rows).view_as(embeddings)


@pytest.mark.parametrize("num_streams", [2, 3])
def test_forward_and_every_gradient_equal_the_slow_reference(num_streams):
    config = site_config(D, 2, connection="mhc_lite", num_streams=num_streams, depth_norm_eps=EPS)
    sites, sublayers = filled_sites(config), linear_sublayers(D, 4)
    embeddings = wave(1, 2, D, phase=0.2).requires_grad_()
    wanted = [embeddings, *sublayers.parameters(), *sites.parameters()]
    actual, expected = run_sites(sites, sublayers, embeddings), slow_network(sites, sublayers, embeddings)
    assert_all_close([actual], [expected], rtol=1e-12)
    assert_all_close(gradients(actual, wanted), gradients(expected, wanted))


def test_golden_values_of_the_authors_code():
    """`MHCLite` of FFTYYY/mhc-lite (commit ea19775), streams summed there and averaged here, no eps."""
    sites = filled_sites(site_config(3, 2, connection="mhc_lite", num_streams=3, depth_norm_eps=1e-30))
    embeddings = wave(1, 2, 3, phase=0.2).requires_grad_()
    output = run_sites(sites, linear_sublayers(3, 4), embeddings)
    expected = [2.08910813413, 3.56964651099, -0.434380392189, -1.85803391633, 0.431574274278, 2.60875440514]
    # The mixing matrices of the first and the last sublayer have no effect, as streams start equal and are averaged.
    bases = [site.weights.base for site in sites[1:3]]
    found = [output.flatten(), *(gradient.flatten() for gradient in gradients(output, [embeddings, *bases]))]
    of_embeddings = [1.30167977789, 1.28675303606, -1.62877251258, -0.335784935426, 1.41948831673, -0.0174709992986]
    of_bases = [
        [
            *[0.0936450467896, 0.0908764801587, 0.114021975077],  # pre
            *[0.488181253758, 0.408654339286, 0.470722787697],  # post
            *[0.000420958290403, -0.00118267403868, -0.00597285329211],  # the permutations
            *[-0.00114381510079, -0.00058502491547, 0.00846340905665],
        ],
        [
            *[-0.0461944156564, -0.0645288621048, -0.0637330035174],
            *[0.0228246522662, -0.0231426775443, -0.112028249033],
            *[-0.00246131394841, -0.0063222728626, 0.00157762013285],
            *[-0.000835832646869, 0.00597411731689, 0.00206768200814],
        ],
    ]
    golden = [torch.tensor(numbers, dtype=torch.float64) for numbers in (expected, of_embeddings, *of_bases)]
    assert_all_close(found, golden, rtol=1e-10)


def test_mixing_matrices_are_doubly_stochastic():
    config = site_config(D, 1, connection="mhc_lite", num_streams=4)
    mixing, _ = filled_sites(config, scale=3.0)[0].weights(wave(2, 3, 4, D))
    ones = torch.ones(2, 3, 4, dtype=torch.float64)
    assert (mixing >= 0).all()
    assert_all_close([mixing[..., 1:].sum(-1), mixing[..., 1:].sum(-2)], [ones, ones], rtol=1e-14)


@pytest.mark.parametrize("num_streams", [2, 3, 4])
def test_initial_model_is_its_host(num_streams):
    stock = tiny_stock_model("llama")
    model = depth_model(stock, connection="mhc_lite", num_streams=num_streams)
    ids = random_ids(2, 11)
    assert relative_max_error(model(ids).logits, stock(ids).logits) < 1e-5


def test_number_of_parameters_is_that_of_the_paper():
    config = site_config(32, 2, connection="mhc_lite")
    counts = [sum(p.numel() for p in site.parameters()) for site in initial_sites(config)]
    assert counts == [(2 * 4 + 24) * (4 * 32 + 1) + 3] * 4 + [0]
