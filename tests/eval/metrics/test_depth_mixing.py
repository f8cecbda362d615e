"""The depth-mixing matrix: against closed forms, depth weights and inputs of sublayers; ranks of every connection."""

import copy

import pytest
import torch
from depth_metric_models import EVERY_CONNECTION, READ_OPTIONS, connection_model, random_depth_model, traces
from tiny_hosts import random_ids, tiny_stock_model

from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.eval.metrics import depth_mixing as module
from hf_depthattn.eval.metrics.depth_mixing import (
    depth_mixing,
    effective_rank,
    mixing_matrices,
    semiseparable_rank,
)
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches

NUM_LAYERS = 4
NUM_SITES = 2 * NUM_LAYERS + 1
#: Connection -> semiseparable rank of every token with perturbed parameters, at 4 layers.
RANKS = {
    "residual": 1,
    "rezero": 1,
    "layer_scale": 1,
    "layer_norm_scaling": 1,
    "deepnorm": 1,
    "keel": 1,
    "highway": 1,
    "layer_drop": 1,
    "x0_lambdas": 2,
    # 4 streams.
    "hyper_connections": 4,
    "mhc": 4,
    "mhc_lite": 4,
    # L / 2 + 1.
    "dense_former": 3,
    "delta": 5,
    # Full AttnRes; the largest rank of a block M[k:, :k + 1] of a 9 x 9 matrix is 5.
    "attn_res": 5,
}


def perturbed_model(connection: str, **fields):
    """A model of four layers in float64."""
    return connection_model(connection, num_layers=NUM_LAYERS, dtype=torch.float64, **fields)


def expanded(matrices, num_channels=32):
    return matrices.expand(*matrices.shape[:-1], num_channels)


@pytest.mark.parametrize("connection", EVERY_CONNECTION)
def test_every_token_of_every_connection_has_its_rank(connection):
    fields = {"sublayers_per_block": 1} if connection == "attn_res" else {}
    found = mixing_matrices(DepthProbe(perturbed_model(connection, **fields)), random_ids(2, 3))
    assert found.matrices.shape[:-1] == (6, NUM_SITES, NUM_SITES)
    # Norms of hosts compute in float32.
    assert found.error <= (1e-6 if connection == "deepnorm" else 1e-15)
    assert not found.matrices.triu(0)[..., torch.ones(NUM_SITES, NUM_SITES).triu(1).bool(), :].any()
    for channel in {0, found.matrices.shape[-1] - 1}:
        assert semiseparable_rank(found.matrices[..., channel]).tolist() == [RANKS[connection]] * 6


def test_blocks_have_one_rank_each_and_one_for_the_open_block():
    model = connection_model("attn_res", num_layers=6, dtype=torch.float64, static_mix=True, sublayers_per_block=4)
    found = mixing_matrices(DepthProbe(model), random_ids(1, 2)).matrices[..., 0]
    assert semiseparable_rank(found).tolist() == [4, 4]


def test_the_matrix_of_a_residual_model_has_ones():
    found = mixing_matrices(DepthProbe(perturbed_model("residual")), random_ids(2, 3))
    assert torch.equal(
        found.matrices, torch.ones(NUM_SITES, NUM_SITES).tril()[..., None].expand(6, -1, -1, 1).double()
    )
    assert found.error == 0


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("option", READ_OPTIONS)
def test_rows_of_attn_res_are_read_scale_times_depth_weights(option, size):
    model = perturbed_model("attn_res", sublayers_per_block=size, **READ_OPTIONS[option])
    config, ids, probe = model.config, random_ids(2, 3), DepthProbe(model)
    matrices = expanded(mixing_matrices(probe, ids).matrices)
    with torch.no_grad():
        weights = model(ids, output_depth_attentions=True).depth_attentions
    for site, of_site in enumerate(weights):
        num_read = of_site.shape[-1]
        scale = num_read if config.read_scale == "sum" else 1
        sources = list(range(config.num_sources(site)))
        read = sources if len(sources) == num_read else [0, *sources[1 - num_read :]]
        expected = torch.zeros(6, NUM_SITES, of_site.shape[-2], dtype=torch.float64)
        for position, source in enumerate(read):
            # Source 0 is the embedding, source b the outputs of block b so far.
            members = [0] if source == 0 else range((source - 1) * size + 1, min(source * size, site) + 1)
            for member in members:
                expected[:, member] = scale * of_site.flatten(0, 1)[..., position]
        of_heads = expected.repeat_interleave(32 // of_site.shape[-2], -1)
        torch.testing.assert_close(matrices[:, site], of_heads, rtol=1e-12, atol=1e-12)


def test_norms_of_the_stream_are_frozen_factors():
    model, ids = perturbed_model("residual", norm_position="post"), random_ids(1, 4)
    states = []
    probe = DepthProbe(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.normal_(1.0, 0.3)
                norm.register_forward_hook(lambda norm, args, output: states.append((norm, args[0])))
        matrices = expanded(mixing_matrices(probe, ids).matrices)
    expected = torch.zeros(4, NUM_SITES, NUM_SITES, 32, dtype=torch.float64)
    expected[:, 0, 0] = 1
    for site, (norm, stream) in enumerate(states[: NUM_SITES - 1], start=1):
        row = expected[:, site - 1].clone()
        row[:, site] = 1
        # The norm computes in float32.
        factor = (stream[0].float().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
        expected[:, site] = row * factor[:, None]
    torch.testing.assert_close(matrices, expected, rtol=1e-6, atol=1e-6)


def test_ranks_of_known_matrices():
    ones = torch.ones(7, 7, dtype=torch.float64).tril()
    assert semiseparable_rank(ones) == 1
    generators = torch.randn(2, 7, 3, dtype=torch.float64)
    assert semiseparable_rank((generators[0] @ generators[1].T).tril()) == 3
    assert semiseparable_rank(torch.randn(7, 7, dtype=torch.float64).tril()) == 4
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5)
    assert effective_rank(torch.ones(5, 5).double()).item() == pytest.approx(1)
    half = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    assert effective_rank(half).item() == pytest.approx(4 / 27**0.25)


def test_the_metric_is_the_mean_over_tokens_spread_over_the_text():
    model, ids = random_depth_model("block", num_depth_heads=2), random_ids(5, 6)
    probe = DepthProbe(model)
    before = traces(model)
    found = depth_mixing(probe, TextBatches(ids, batch_size=2))
    every = mixing_matrices(probe, ids).matrices.mean(-1)
    above = torch.ones(7, 7).triu(1).bool()
    assert found.num_tokens == 30 and found.sites[-1] == "output" and found.sources[:2] == ("emb.", "attn 0")
    assert torch.allclose(found.means.nan_to_num(), every.mean(0)) and torch.equal(found.means.isnan(), above)
    assert torch.allclose(found.variances.nan_to_num(), every.var(0, correction=0))
    assert found.effective_rank == pytest.approx(effective_rank(every).mean().item())
    assert found.semiseparable_rank == found.least_semiseparable_rank == 3 and found.error < 1e-6
    some = depth_mixing(probe, TextBatches(ids, batch_size=2), num_tokens=4)
    assert torch.allclose(some.means.nan_to_num(), every[[0, 7, 15, 22]].mean(0)) and some.num_tokens == 4
    assert traces(model) == before


def test_results_do_not_depend_on_how_many_tokens_run_at_once(monkeypatch):
    probe, ids = DepthProbe(random_depth_model("full")), random_ids(2, 4)
    whole = mixing_matrices(probe, ids)
    monkeypatch.setattr(module, "_MOST_NUMBERS", 3 * 7 * 7 * 32)
    parts = mixing_matrices(probe, ids)
    assert torch.allclose(whole.matrices, parts.matrices, rtol=1e-6) and abs(whole.error - parts.error) < 1e-7


def test_half_precision_models_have_nearly_the_same_matrix():
    model, ids = random_depth_model("block+moda"), random_ids(2, 5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    wide, found = (mixing_matrices(DepthProbe(each), ids) for each in (model, half))
    assert found.error <= 0.01 and torch.allclose(found.matrices, wide.matrices, atol=0.05)


def test_stock_models_and_reads_that_are_no_sums_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="a stock model has no depth sites"):
        mixing_matrices(DepthProbe(tiny_stock_model("llama")), random_ids(1, 3))
    probe = DepthProbe(random_depth_model("residual"))
    site = CONNECTIONS["residual"]
    for write, message in (
        (lambda self, state, y: state._replace(partial=(state.partial + y).roll(1, -1)), r"a 'residual' model read"),
        (lambda self, state, y: state._replace(partial=(state.partial + y).tanh()), "nonlinear or unknown operation"),
    ):
        monkeypatch.setattr(site, "write", write)
        with pytest.raises(ValueError, match=message):
            mixing_matrices(probe, random_ids(1, 3))


def sites_of(model):
    layers = model.model.layers
    return [site for layer in layers for site in (layer.attn_depth, layer.mlp_depth)]


def by_recursion(step, num_channels=1):
    """Rows of M from h_{s+1} = step(h_s, unit row of y_s, s), with rows [tokens, S, C]."""
    rows = [torch.zeros(6, NUM_SITES, num_channels, dtype=torch.float64)]
    rows[0][:, 0] = 1
    for site in range(NUM_SITES - 1):
        unit = torch.zeros(6, NUM_SITES, num_channels, dtype=torch.float64)
        unit[:, site + 1] = 1
        rows.append(step(rows[-1], unit, site))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("connection", ["rezero", "layer_scale"])
def test_scaled_branches_scale_columns(connection):
    model = perturbed_model(connection)
    scales = [site.branch.scale for site in sites_of(model)]
    with torch.no_grad():
        found = mixing_matrices(DepthProbe(model), random_ids(2, 3)).matrices
        expected = by_recursion(lambda h, y, s: h + scales[s] * y, num_channels=len(scales[0]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_x0_lambdas_add_the_embedding_before_every_layer():
    model = perturbed_model("x0_lambdas")
    mixes = [site.mix for site in sites_of(model)]
    embedding = torch.zeros(6, NUM_SITES, 1, dtype=torch.float64)
    embedding[:, 0] = 1

    def mixed(h, mix):
        return h if mix is None else mix.stream_scale * h + mix.embedding_scale * embedding

    with torch.no_grad():
        found = mixing_matrices(DepthProbe(model), random_ids(2, 3)).matrices
        rows = [mixed(embedding, mixes[0])]
        for site in range(NUM_SITES - 1):
            unit = torch.zeros_like(embedding)
            unit[:, site + 1] = 1
            rows.append(mixed(rows[-1] + unit, mixes[site] if site else None))
    torch.testing.assert_close(found, torch.stack(rows, 1), rtol=1e-12, atol=1e-12)


def test_rows_of_a_highway_network_sum_to_one():
    found = mixing_matrices(DepthProbe(perturbed_model("highway")), random_ids(2, 3)).matrices
    torch.testing.assert_close(found.sum(2), torch.ones_like(found.sum(2)), rtol=1e-12, atol=1e-12)
    assert found[:, -1].std() > 0.01


def test_static_hyper_connections_have_the_closed_form():
    """M_li = a_l^T A_{l-1}^T ... A_i^T b_{i-1} with b_{-1} = 1, and the mean of streams as the last row."""
    model = perturbed_model("hyper_connections", stream_mix="static", num_streams=3)
    found = mixing_matrices(DepthProbe(model), random_ids(2, 3)).matrices
    weights = [site.weights for site in sites_of(model)]
    reads = [w.mixing[:, 0].detach() for w in weights] + [torch.full((3,), 1 / 3, dtype=torch.float64)]
    expected = torch.zeros(NUM_SITES, NUM_SITES, dtype=torch.float64)
    for row in range(NUM_SITES):
        for column in range(row + 1):
            streams = torch.ones(3, dtype=torch.float64) if column == 0 else weights[column - 1].post.detach()
            for between in range(column, row):
                streams = weights[between].mixing[:, 1:].detach().T @ streams
            expected[row, column] = reads[row] @ streams
    torch.testing.assert_close(found, expected[None, ..., None].expand_as(found), rtol=1e-12, atol=1e-12)


def test_dense_former_averages_states():
    model = perturbed_model("dense_former")
    averages = [layer.mlp_depth.average.weight.detach() for layer in model.model.layers]
    states = []

    def step(h, y, site):
        states.extend([h] if site == 0 else [])
        h = h + y
        if site % 2:
            states.append(h)
            h = sum(w * x for w, x in zip(averages[site // 2], states, strict=True))
        return h

    found = mixing_matrices(DepthProbe(model), random_ids(2, 3)).matrices
    torch.testing.assert_close(found, by_recursion(step), rtol=1e-12, atol=1e-12)


def test_the_null_source_of_delta_is_a_constant():
    found = mixing_matrices(DepthProbe(perturbed_model("delta")), random_ids(2, 3))
    without_gate = perturbed_model("delta")
    with torch.no_grad():
        for site in sites_of(without_gate):
            site.gate.zero_()
    plain = mixing_matrices(DepthProbe(without_gate), random_ids(2, 3)).matrices
    assert torch.equal(plain[..., 0], torch.ones(NUM_SITES, NUM_SITES).tril().double().expand(6, -1, -1))
    # At site 0 the null source is all that is read.
    assert torch.equal(found.matrices[:, 0, 0], torch.ones(6, 1).double()) and found.matrices[:, 1:-1].std() > 0.1
