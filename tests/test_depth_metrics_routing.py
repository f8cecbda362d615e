"""Depth weights, slot mass and source drops against softmaxes written out by hand."""

import copy
import math

import pytest
import torch
from depth_metric_models import random_depth_model, traces
from model_checks import depth_model, randomise_depth
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.metrics.interventions import drop_slots, visible_slots
from hf_depthattn.eval.metrics.probe import DepthProbe
from hf_depthattn.eval.metrics.routing import depth_weights, slot_mass
from hf_depthattn.eval.metrics.slot_drop import slot_drop
from hf_depthattn.eval.metrics.source_drop import (
    depth_sites,
    dropped_sources,
    old_sources,
    partial_read,
    random_drops,
    source_drop,
    source_drop_matrix,
    visible_sources,
)
from hf_depthattn.eval.metrics.text import TextBatches
from hf_depthattn.eval.metrics.weights import mean_depth_weights

READ_OPTIONS = {
    "paper": {},
    "sum": {"read_scale": "sum"},
    "heads": {"num_depth_heads": 2},
    "sigmoid": {"depth_activation": "sigmoid"},
    "raw keys": {"key_norm": False},
    "input query": {"query": "input"},
    "static": {"static_mix": True, "num_depth_heads": 2},
    "static sum": {"static_mix": True, "read_scale": "sum"},
    "window": {"depth_window": 2},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def states_of(model, ids):
    """Depth state and output of every site in one pass."""
    seen, handles = {}, []
    for number, site in enumerate(depth_sites(DepthProbe(model))):

        def keep(site, args, output, number=number):
            seen[number] = (args[0], output[0])

        handles.append(site.register_forward_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("option", READ_OPTIONS)
def test_a_partial_read_of_all_sources_is_the_read(option):
    model = random_depth_model("block", **READ_OPTIONS[option])
    for number, (state, output) in states_of(model, random_ids(2, 7)).items():
        site = depth_sites(DepthProbe(model))[number]
        kept = tuple(range(len(visible_sources(DepthProbe(model))[number])))
        with torch.no_grad():
            assert torch.allclose(partial_read(site, state, kept), output, atol=1e-5)


@pytest.mark.parametrize("read_scale", ["mean", "sum"])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_dropped_source_is_not_in_the_softmax(source, read_scale):
    model, ids, site = random_depth_model("block", read_scale=read_scale), random_ids(2, 7), 4
    state, _ = states_of(model, ids)[site]
    sources = [v for i, v in enumerate((*state.sources, state.partial)) if i != source]
    module = depth_sites(DepthProbe(model))[site]
    weight = module.query * module.key_norm.weight
    scores = torch.stack([(weight * v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum(-1) for v in sources])
    expected = (scores.exp() / scores.exp().sum(0)).unsqueeze(-1).mul(torch.stack(sources)).sum(0)
    if read_scale == "sum":
        expected = 2 * expected
    with dropped_sources(DepthProbe(model), [(site, source)]):
        dropped = states_of(model, ids)
    assert torch.allclose(dropped[site][1], expected, atol=1e-5)
    # Sites before read as ever.
    whole = states_of(model, ids)
    assert all(torch.equal(dropped[i][1], whole[i][1]) for i in range(site))
    assert not torch.allclose(dropped[site + 1][1], whole[site + 1][1], atol=1e-5)


def test_a_dropped_static_source_keeps_the_scores_of_the_others():
    model, ids, site = random_depth_model("block", static_mix=True), random_ids(2, 7), 4
    with torch.no_grad():
        depth_sites(DepthProbe(model))[site].mix_scores.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    state, _ = states_of(model, ids)[site]
    weights = torch.tensor([0.5, 2.0]).softmax(-1)
    with dropped_sources(DepthProbe(model), [(site, 1)]):
        _, output = states_of(model, ids)[site]
    assert torch.allclose(output, weights[0] * state.sources[0] + weights[1] * state.partial, atol=1e-6)


def test_dropping_the_newest_source_keeps_an_input_query():
    model, ids, site = random_depth_model("block", query="input"), random_ids(2, 7), 4
    state, _ = states_of(model, ids)[site]
    module = depth_sites(DepthProbe(model))[site]
    with torch.no_grad(), dropped_sources(DepthProbe(model), [(site, 2)]):
        weight = module._score_weight(state.partial)
        keys = [v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in state.sources]
        shares = torch.stack([(weight * key).sum(-1) for key in keys], -1).softmax(-1)
        expected = sum(shares[..., i, None] * v for i, v in enumerate(state.sources))
    with dropped_sources(DepthProbe(model), [(site, 2)]):
        assert torch.allclose(states_of(model, ids)[site][1], expected, atol=1e-5)


def test_source_drop_measures_the_loss_beside_random_drops():
    model, text = random_depth_model("block"), TextBatches(random_ids(4, 9), batch_size=2)
    probe = DepthProbe(model)
    drops = old_sources(probe)
    result = source_drop(model, text, drops=drops, num_controls=3, seed=5)
    with torch.no_grad():
        loss = probe.loss(text)
        with dropped_sources(probe, drops):
            assert result.increase == probe.loss(text) - loss
        for control, increase in zip(random_drops(probe, drops, 3, 5), result.control_increases, strict=True):
            with dropped_sources(probe, control):
                assert increase == probe.loss(text) - loss
    assert result.control_mean == result.control_increases.mean() and result.loss == loss
    assert result.increase != 0 and result.control_std > 0


def test_random_drops_match_in_count_and_follow_their_seed():
    probe = DepthProbe(random_depth_model("full"))
    drops = old_sources(probe)
    assert drops[:3] == ((2, 0), (3, 0), (3, 1))
    controls = random_drops(probe, drops, 4, seed=0)

    def per_site(pairs):
        return sorted(site for site, _ in pairs)

    assert all(per_site(control) == per_site(drops) and len(set(control)) == len(drops) for control in controls)
    assert all(set(control) != set(drops) for control in controls) and len(set(controls)) > 1
    assert random_drops(probe, drops, 4, seed=0) == controls != random_drops(probe, drops, 4, seed=1)


def test_the_drop_matrix_is_made_of_single_drops():
    model, ids = random_depth_model("block"), random_ids(2, 9)
    result = source_drop_matrix(model, ids)
    visible = visible_sources(DepthProbe(model))
    for site, source in [(1, 0), (4, 1), (6, 3)]:
        single = source_drop(model, ids, drops=[(site, source)], num_controls=0)
        assert math.isclose(result.increases[site, source], single.increase, abs_tol=1e-9)
        assert math.isnan(single.control_mean)
        others = [result.increases[site, i].item() for i in visible[site] if i != source]
        assert math.isclose(result.controls[site, source], sum(others) / len(others), abs_tol=1e-9)
    known = result.increases.isfinite().sum(-1).tolist()
    assert known == [0 if len(sources) < 2 else len(sources) for sources in visible]


@pytest.mark.parametrize(
    ("drops", "message"),
    [
        ([(0, 0)], "site 0 would read nothing"),
        ([(1, 0), (1, 1)], "site 1 would read nothing"),
        ([(1, 2)], r"\(1, 2\) does not exist"),
        ([(7, 0)], r"\(7, 0\) does not exist; sites are 0 to 6"),
    ],
)
def test_impossible_drops_are_errors(drops, message):
    model = random_depth_model("block")
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        source_drop(model, random_ids(2, 5), drops=drops)
    assert traces(model) == before


def test_models_without_sources_or_slots_are_errors():
    ids = random_ids(2, 5)
    for call in (depth_weights, source_drop_matrix):
        with pytest.raises(ValueError, match="connection: the model is of the family 'moda'"):
            call(random_depth_model("moda"), ids)
    for call in (slot_mass, slot_drop):
        for model in (random_depth_model("block"), tiny_stock_model("llama")):
            with pytest.raises(ValueError, match="depth_kv: the model is of the family"):
                call(model, ids)


def test_a_model_of_one_layer_has_slots_that_nobody_reads():
    config = copy.deepcopy(tiny_stock_model("llama").config)
    config.num_hidden_layers = 1
    model = DepthAttnForCausalLM(DepthAttnConfig.moda(config)).eval()
    with pytest.raises(ValueError, match="num_hidden_layers: no layer of 1 reads a depth slot"):
        slot_mass(model, random_ids(2, 5))


@pytest.mark.parametrize("option", READ_OPTIONS)
def test_depth_weights_are_moments_over_tokens(option):
    model, ids = random_depth_model("block", **READ_OPTIONS[option]), random_ids(5, 6)
    text = TextBatches(ids, batch_size=2)
    result = depth_weights(model, text)
    with torch.no_grad():
        outputs = model(ids, output_depth_attentions=True).depth_attentions
    for site, (weights, columns) in enumerate(zip(outputs, visible_sources(DepthProbe(model)), strict=True)):
        tokens = weights.double().flatten(0, 1)  # [tokens, H, n]
        columns = list(columns)
        assert torch.allclose(result.means[site, columns], tokens.mean((0, 1)), atol=1e-7)
        variance = tokens.var(0, unbiased=False).mean(0)
        assert torch.allclose(result.variances[site, columns], variance, atol=1e-7)
        assert result.means[site].isfinite().sum() == len(columns)
        if len(columns) == 1:
            assert result.entropies[site].isnan()
            continue
        shares = tokens / tokens.sum(-1, keepdim=True)
        entropy = -(shares * shares.log()).sum(-1).mean() / math.log(len(columns))
        assert torch.allclose(result.entropies[site], entropy, atol=1e-6)
        assert result.argmax[site] == columns[tokens.mean((0, 1)).argmax()]
    if option == "static":
        assert result.variances.nan_to_num().max() <= 1e-12 and result.query_norms.isnan().all()
    if option == "paper":
        assert torch.allclose(result.means, mean_depth_weights(model, text), equal_nan=True)
        query = model.get_decoder().layers[1].attn_depth
        assert torch.allclose(result.query_norms[2], (query.query * query.key_norm.weight).norm().double())


def test_zero_queries_are_uniform_and_have_entropy_one():
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    result = depth_weights(model, random_ids(2, 5))
    assert torch.allclose(result.entropies[1:], torch.ones(2 * NUM_LAYERS, dtype=torch.float64), atol=1e-6)
    assert result.variances.nan_to_num().max() <= 1e-12 and (result.query_norms == 0).all()


@pytest.mark.parametrize("depth_kv", ["attention", "attention+mlp"])
def test_slot_masses_and_the_sequence_sum_to_one(depth_kv):
    model, ids = random_depth_model("moda", depth_kv=depth_kv), random_ids(3, 8)
    result = slot_mass(model, TextBatches(ids, batch_size=2))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    for layer in range(1, NUM_LAYERS):
        sequence = attentions[layer].double().sum(-1)  # [B, H, T]
        assert torch.allclose(result.totals[layer] + sequence.mean((0, 2)), torch.ones(4).double(), atol=1e-6)
        assert torch.allclose(result.by_position[layer], 1 - sequence.mean((0, 1)), atol=1e-6)
        parts = result.attention[layer] + result.mlp[layer].nan_to_num()
        assert torch.allclose(parts, result.totals[layer], atol=1e-9)
    assert result.totals[0].isnan().all() and result.mlp.isnan().all() == (depth_kv == "attention")


def test_slots_are_named_by_writer_and_age():
    model, ids = random_depth_model("moda"), random_ids(3, 8)
    result = slot_mass(model, ids)
    assert result.slots == ("attn 0", "mlp 0", "attn 1", "mlp 1")
    with torch.no_grad():
        weights = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()  # [B, H, T, 4]
    assert torch.allclose(result.by_slot[2], weights.mean((0, 2)), atol=1e-7)
    means = weights.mean((0, 1, 2))
    assert torch.allclose(result.attention_by_age[2, [2, 1]], means[[0, 2]], atol=1e-7)
    assert torch.allclose(result.mlp_by_age[2, [2, 1]], means[[1, 3]], atol=1e-7)
    assert result.attention_by_age[2, 0].isnan() and result.attention_by_age[1, 2].isnan()
    expected = sum(4 / (t + 4) for t in range(1, 9)) / 8
    assert math.isclose(result.uniform[2], expected, abs_tol=1e-12)
    assert not result.gated


@pytest.mark.parametrize("num_slots", [1, 3])
def test_visible_slots_are_those_that_layers_read(num_slots):
    model = random_depth_model("moda", num_depth_slots=num_slots)
    names = [("attn", 0), ("mlp", 0), ("attn", 1), ("mlp", 1)]
    expected = [[], names[:2][-num_slots:], names[-num_slots:]]
    assert visible_slots(model.config, DepthProbe(model).layers) == expected


def test_dropped_slots_leave_the_softmax():
    model, ids = random_depth_model("moda"), random_ids(2, 8)
    layers = DepthProbe(model).layers
    with torch.no_grad():
        whole = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()
        with drop_slots(model.config, layers, {("attn", 1)}):
            dropped = model(ids, output_depth_attentions=True).depth_kv_attentions[2].double()
    # Layer 2 has the same inputs in both runs: its weights are renormalised, the sequence's share among them.
    rest = whole[..., [0, 1, 3]]
    expected = rest / (1 - whole[..., [2]])
    assert torch.allclose(dropped, expected, atol=1e-6)
    twice = drop_slots(model.config, layers, {("attn", 0)})
    message = "slots are dropped already"
    with drop_slots(model.config, layers, {("attn", 1)}), pytest.raises(ValueError, match=message), twice:
        pass


def test_randomised_models_route_by_token():
    """The comparisons above would pass trivially if weights did not depend on the token."""
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=2)
    randomise_depth(model)
    result = depth_weights(model, random_ids(2, 9))
    assert (result.variances[3:].nan_to_num().max(-1).values > 1e-4).all()


def test_slot_drop_compares_losses():
    model, ids = random_depth_model("moda"), random_ids(3, 8)
    probe, result = DepthProbe(model), slot_drop(model, ids)
    assert result.slots == ("attn 0", "mlp 0", "attn 1", "mlp 1")
    with torch.no_grad():
        for index, slot in enumerate([("attn", 0), ("mlp", 0), ("attn", 1), ("mlp", 1)]):
            with drop_slots(model.config, probe.layers, {slot}):
                assert result.by_slot[index] == probe.loss(TextBatches(ids)) - result.loss
    others = result.by_slot[[0, 2, 3]].mean()
    assert torch.allclose(result.by_slot_controls[1], others) and result.by_slot.abs().min() > 0
    # A gate of zero is a layer without slots.
    gated = random_depth_model("moda", depth_gate="head")
    for layer in (1, 2):
        closed = copy.deepcopy(gated)
        torch.nn.init.zeros_(closed.get_decoder().layers[layer].attn_depth_kv.gate)
        with torch.no_grad():
            expected = DepthProbe(closed).loss(TextBatches(ids)) - DepthProbe(gated).loss(TextBatches(ids))
        assert math.isclose(slot_drop(gated, ids).by_layer[layer], expected, abs_tol=1e-6)
    assert result.by_layer[0].isnan()
