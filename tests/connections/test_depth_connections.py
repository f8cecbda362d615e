"""Depth connections against a slow reference written from the equations: loops over tokens and sources, float64."""

import math

import pytest
import torch
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.attn_res_reads import DepthReads, has_depth_reads, read_weights
from hf_depthattn.depth_connections import CONNECTIONS, depth_site
from hf_depthattn.depth_options import DepthConnectionType

D = 12
EPS = 1e-3  # large, so that its place in the formula shows


def slow_read(site, reads, sources, config):
    """`h = scale * sum_i a_i v_i`, token by token (arXiv 2603.15031, Eq. 2-4, and the ablations)."""
    if config.depth_window is not None and len(sources) > config.depth_window + 1:
        sources = [sources[0], *sources[len(sources) - config.depth_window :]]
    num_sources, heads = len(sources), config.num_depth_heads
    width = D // heads
    rows = []
    for b in range(sources[0].shape[0]):
        for t in range(sources[0].shape[1]):
            values = [source[b, t] for source in sources]
            keys = values
            if config.key_norm:
                keys = [v / ((v * v).sum() / D + EPS).sqrt() for v in values]
                if not config.static_mix:
                    keys = [k * reads.key_norm[site.site] for k in keys]
            parts = []
            for head in range(heads):
                channels = slice(head * width, (head + 1) * width)
                if config.static_mix:
                    scores = [site.mix_scores[head, i] for i in range(num_sources)]
                else:
                    query = reads.query[site.site]
                    if config.query == "input":
                        newest = values[-1]
                        query = query + site.query_proj.weight @ (newest / ((newest * newest).sum() / D + EPS).sqrt())
                    scores = [(query[channels] * k[channels]).sum() for k in keys]
                if num_sources == 1:
                    weights = [1.0]
                elif config.depth_activation == "softmax":
                    total = sum(score.exp() for score in scores)
                    weights = [score.exp() / total for score in scores]
                else:
                    weights = [2 / (1 + (-score).exp()) / num_sources for score in scores]
                scale = num_sources if config.read_scale == "sum" else 1
                parts.append(scale * sum(a * v[channels] for a, v in zip(weights, values, strict=True)))
            rows.append(torch.cat(parts))
    return torch.stack(rows).view_as(sources[0])


def slow_network(sites, reads, embeddings, sublayers, config):
    """The paper's bookkeeping with explicit blocks, in a form unlike the implementation's."""
    size = config.block_size_sublayers
    outputs = []
    for s, sublayer in enumerate(sublayers):
        block_start = size * (s // size)
        finished = [embeddings] + [sum(outputs[i : i + size]) for i in range(0, block_start, size)]
        open_block = outputs[block_start:s]
        sources = finished + ([sum(open_block)] if open_block else [])
        outputs.append(sublayer(slow_read(sites[s], reads, sources, config)))
    blocks = [sum(outputs[i : i + size]) for i in range(0, len(outputs), size)]
    return slow_read(sites[-1], reads, [embeddings, *blocks], config)


def network(sites, reads, embeddings, sublayers, schedule):
    weights = None if reads is None else read_weights(reads, schedule)
    state = sites[0].begin(embeddings)
    for site, sublayer in zip(sites, sublayers, strict=False):
        h, state, _ = site(state, weights)
        state = site.write(state, sublayer(h))
    return sites[-1](state, weights)[0]


CASES = {
    "full": {"sublayers_per_block": 1},
    "block2": {"sublayers_per_block": 2},
    "block3-short-last": {"sublayers_per_block": 3},
    "block5-short-last": {"sublayers_per_block": 5},
    "one-block": {"sublayers_per_block": 8},
    "num_blocks3": {"num_blocks": 3},
    "sum": {"sublayers_per_block": 3, "read_scale": "sum"},
    "sigmoid": {"sublayers_per_block": 2, "depth_activation": "sigmoid"},
    "sigmoid-sum": {"sublayers_per_block": 1, "depth_activation": "sigmoid", "read_scale": "sum"},
    "raw-keys": {"sublayers_per_block": 2, "key_norm": False},
    "heads3": {"sublayers_per_block": 1, "num_depth_heads": 3},
    "input-query": {"sublayers_per_block": 3, "query": "input"},
    "input-query-heads-sum": {"sublayers_per_block": 1, "query": "input", "num_depth_heads": 4, "read_scale": "sum"},
    "static-mix": {"sublayers_per_block": 3, "static_mix": True},
    "static-mix-heads-sigmoid": {
        "sublayers_per_block": 1,
        "static_mix": True,
        "num_depth_heads": 2,
        "depth_activation": "sigmoid",
    },
    "window2": {"sublayers_per_block": 1, "depth_window": 2},
    "window3-static": {"sublayers_per_block": 1, "depth_window": 3, "static_mix": True},
}


@pytest.mark.parametrize("schedule", ["single", "grouped"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_forward_and_every_gradient_equal_the_slow_reference(fields, schedule):
    host = tiny_host_config("llama", hidden_size=D, num_hidden_layers=4, num_attention_heads=2, head_dim=6)
    config = DepthAttnConfig(text_config=host, depth_norm_eps=EPS, **fields)
    sites = torch.nn.ModuleList(depth_site(config, s) for s in range(config.num_sublayers + 1)).double()
    reads = DepthReads(config).double() if has_depth_reads(config) else None
    of_depth = [*sites.parameters(), *(reads.parameters() if reads is not None else ())]
    with torch.no_grad():
        for parameter in of_depth:
            parameter.add_(torch.randn_like(parameter) * 0.7)
    sublayers = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(config.num_sublayers)).double()
    embeddings = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    wanted = [embeddings, *sublayers.parameters(), *of_depth]
    cotangent = torch.randn(2, 3, D, dtype=torch.float64)
    bounded = [torch.nn.Sequential(f, torch.nn.Tanh()) for f in sublayers]

    actual = network(sites, reads, embeddings, bounded, schedule)
    expected = slow_network(sites, reads, embeddings, bounded, config)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    actual_gradients = torch.autograd.grad(actual, wanted, cotangent, allow_unused=True)
    expected_gradients = torch.autograd.grad(expected, wanted, cotangent, allow_unused=True)
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8])
def test_source_counts(size):
    """`DepthAttnConfig.num_sources` says how many sources each read sees."""
    config = DepthAttnConfig(text_config=tiny_host_config("llama", num_hidden_layers=4), sublayers_per_block=size)
    state = depth_site(config, 0).begin(torch.randn(1, 2, 32))
    reads = read_weights(DepthReads(config), "auto")
    for s in range(config.num_sublayers + 1):
        site = depth_site(config, s)
        _, state, weights = site(state, reads, return_weights=True)
        assert weights.shape == (1, 2, 1, config.num_sources(s))
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / config.num_sources(s)))
        state = site.write(state, torch.randn(1, 2, 32))


@pytest.mark.parametrize("num_layers, num_blocks", [(13, 8), (27, 9), (12, 8), (5, 8), (4, 3), (1, 1), (16, 16)])
def test_num_blocks_is_never_exceeded(num_layers, num_blocks):
    config = DepthAttnConfig.attn_res(tiny_host_config("llama", num_hidden_layers=num_layers), num_blocks=num_blocks)
    assert math.ceil(config.num_sublayers / config.block_size_sublayers) <= num_blocks
    assert config.num_sources(config.num_sublayers) <= num_blocks + 1


def test_states_share_tensors_and_are_never_changed():
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=1)
    states = [depth_site(config, 0).begin(torch.randn(1, 2, 32))]
    for s in range(config.num_sublayers):
        states.append(depth_site(config, s).write(states[-1], torch.randn(1, 2, 32)))
    distinct = {id(tensor) for state in states for tensor in (*state.sources, state.partial)}
    assert len(distinct) == config.num_sublayers + 1


def test_registry_covers_every_connection_type():
    assert set(CONNECTIONS) == set(DepthConnectionType)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_depth_parameters_stay_float32_under_half_precision_casts(cast):
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), query="input")
    for module in (depth_site(config, 3), DepthReads(config)):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {name: parameter.clone() for name, parameter in module.named_parameters()}
        cast(module)
        assert before
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, before[name]), name
        assert next(module.double().parameters()).dtype == torch.float64


def test_a_site_without_the_weights_of_reads_names_what_is_missing():
    config = DepthAttnConfig(text_config=tiny_host_config("llama"))
    site = depth_site(config, 0)
    with pytest.raises(ValueError, match=r"depth_reads: missing at site 0; .* `depth_reads=read_weights"):
        site(site.begin(torch.randn(1, 2, 32)))
