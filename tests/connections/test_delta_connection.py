"""Delta Attention Residuals against a slow reference and golden values of the authors' code."""

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

D = 6
EPS = 1e-3  # large, so that its place in the formula shows


def slow_network(sites, sublayers, embeddings, heads):
    """Token by token, with single numbers: `h = p + gate * sum_i softmax_i(query . RMSNorm(v_i)) v_i`."""
    width = D // heads
    rows = []
    for token in embeddings.flatten(0, 1):
        p, deltas = token, []
        for site, sublayer in zip(sites, sublayers, strict=False):
            sources = [site.null, *deltas]
            parts = []
            for head in range(heads):
                channels = range(head * width, (head + 1) * width)
                scores = []
                for v in sources:
                    rms = (sum(value * value for value in v) / D + EPS).sqrt()
                    scores.append(sum(site.query[c] * site.key_norm[c] * v[c] / rms for c in channels))
                total = sum(score.exp() for score in scores)
                parts += [sum(a.exp() / total * v[c] for a, v in zip(scores, sources, strict=True)) for c in channels]
            y = sublayer(p + site.gate * torch.stack(parts))
            deltas = [*(deltas or [token]), y]
            p = p + y
        rows.append(p)
    return torch.stack(rows).view_as(embeddings)


@pytest.mark.parametrize("heads", [1, 3])
def test_forward_and_every_gradient_equal_the_slow_reference(heads):
    config = site_config(D, 2, connection="delta", num_depth_heads=heads, depth_norm_eps=EPS)
    sites, sublayers = filled_sites(config), linear_sublayers(D, 4)
    embeddings = wave(1, 2, D, phase=0.2).requires_grad_()
    wanted = [embeddings, *sublayers.parameters(), *sites.parameters()]
    actual, expected = run_sites(sites, sublayers, embeddings), slow_network(sites, sublayers, embeddings, heads)
    assert_all_close([actual], [expected], rtol=1e-12)
    assert_all_close(gradients(actual, wanted), gradients(expected, wanted))


def test_golden_values_of_the_authors_code():
    """`delta_attn_res` of wdlctc/delta-attention-residuals-code (commit fc11c3e) with a null source and
    `learnable_alpha`."""
    sites = filled_sites(site_config(3, 2, connection="delta", depth_norm_eps=1e-3))
    embeddings = wave(1, 2, 3, phase=0.2).requires_grad_()
    output = run_sites(sites, linear_sublayers(3, 4), embeddings)
    nulls, gates = [site.null for site in sites[:-1]], [site.gate for site in sites[:-1]]
    found = gradients(output, [embeddings, *nulls, *gates])
    golden = [
        [1.74578260728, 2.97865300461, -0.598834569024, -1.53018385691, 0.580514740978, 1.29125269981],
        [1.50807711831, 0.312584093651, -1.63558702986, 0.239208601827, 2.56795029884, -0.993797488125],
        [0.0557459004085, 0.84124037366, -0.272524281459],
        [0.12909700351, 0.0474014324675, -0.0684723226094],
        [-0.00843590300923, 0.00303855232846, 0.00430484792846],
        [-0.0139906829934, 0.0126293639886, 0.0214556194254],
        *([number] for number in (1.10431657591, 0.429097742775, -0.126094243559, -0.101625885651)),
    ]
    golden = [torch.tensor(numbers, dtype=torch.float64) for numbers in golden]
    assert_all_close([output.flatten(), *(gradient.flatten() for gradient in found)], golden, rtol=1e-11)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2"])
def test_initial_model_is_its_host_to_the_bit(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, connection="delta")
    ids = random_ids(2, 11)
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_only_gates_learn_at_first_and_site_0_never():
    sites = initial_sites(site_config(D, 2, connection="delta")).double()
    output = run_sites(sites, linear_sublayers(D, 4), wave(1, 2, D))
    named = dict(sites.named_parameters())
    found = dict(zip(named, gradients(output, list(named.values())), strict=True))
    assert {name for name, gradient in found.items() if gradient.any()} == {"1.gate", "2.gate", "3.gate"}


def test_weights_of_the_sources_begin_with_null():
    sites = filled_sites(site_config(D, 1, connection="delta", num_depth_heads=2))
    embeddings, y = wave(1, 3, D), wave(1, 3, D, phase=2.0)
    state = sites[0].write(sites[0].begin(embeddings), y)
    h, _, weights = sites[1](state, return_weights=True)
    assert weights.shape == (1, 3, 2, 3)
    values = torch.stack([sites[1].null.expand_as(y), embeddings, y], 2).unflatten(-1, (2, -1))  # [B, T, N, H, D / H]
    mixed = torch.einsum("bthn,btnhd->bthd", weights, values).flatten(-2)
    assert_all_close([h], [state.partial + sites[1].gate * mixed], rtol=1e-13)


def test_sites_have_three_vectors_and_a_gate():
    sites = initial_sites(site_config(32, 2, connection="delta"))
    assert [sum(p.numel() for p in site.parameters()) for site in sites] == [3 * 32 + 1] * 4 + [0]


def test_queries_of_sites_load_from_a_state_dict():
    """They have the names of AttnRes queries in old checkpoints, which are refused."""
    model, other = (depth_model(tiny_stock_model("llama"), connection="delta") for _ in range(2))
    with torch.no_grad():
        model.model.layers[1].attn_depth.query.fill_(0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.model.layers[1].attn_depth.query, model.model.layers[1].attn_depth.query)
