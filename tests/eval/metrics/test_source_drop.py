"""Sources dropped from AttnRes reads, against softmaxes written out by hand."""

import math

import pytest
import torch
from depth_metric_models import READ_OPTIONS, random_depth_model, score_weight, traces
from tiny_hosts import random_ids

from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
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


def states_of(model, ids):
    """Settled depth state, weights of all reads and output of every site in one pass."""
    seen, handles = {}, []
    for number, site in enumerate(depth_sites(DepthProbe(model))):

        def keep(site, args, output, number=number):
            seen[number] = (args[0].settled(), args[1], output[0])

        handles.append(site.register_forward_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("option", READ_OPTIONS)
def test_a_partial_read_of_all_sources_is_the_read(option):
    model = random_depth_model("block", **READ_OPTIONS[option])
    for number, (state, reads, output) in states_of(model, random_ids(2, 7)).items():
        site = depth_sites(DepthProbe(model))[number]
        kept = tuple(range(len(visible_sources(DepthProbe(model))[number])))
        with torch.no_grad():
            assert torch.allclose(partial_read(site, state, reads, kept), output, atol=1e-5)


@pytest.mark.parametrize("read_scale", ["mean", "sum"])
@pytest.mark.parametrize("source", [0, 1, 2])
def test_a_dropped_source_is_not_in_the_softmax(source, read_scale):
    model, ids, site = random_depth_model("block", read_scale=read_scale), random_ids(2, 7), 4
    state, _, _ = states_of(model, ids)[site]
    sources = [v for i, v in enumerate((*state.sources, state.partial)) if i != source]
    weight = score_weight(model, site)
    scores = torch.stack([(weight * v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum(-1) for v in sources])
    expected = (scores.exp() / scores.exp().sum(0)).unsqueeze(-1).mul(torch.stack(sources)).sum(0)
    if read_scale == "sum":
        expected = 2 * expected
    with dropped_sources(DepthProbe(model), [(site, source)]):
        dropped = states_of(model, ids)
    assert torch.allclose(dropped[site][-1], expected, atol=1e-5)
    # Sites before read as ever.
    whole = states_of(model, ids)
    assert all(torch.equal(dropped[i][-1], whole[i][-1]) for i in range(site))
    assert not torch.allclose(dropped[site + 1][-1], whole[site + 1][-1], atol=1e-5)


def test_a_dropped_static_source_keeps_the_scores_of_the_others():
    model, ids, site = random_depth_model("block", static_mix=True), random_ids(2, 7), 4
    with torch.no_grad():
        depth_sites(DepthProbe(model))[site].mix_scores.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    state, _, _ = states_of(model, ids)[site]
    weights = torch.tensor([0.5, 2.0]).softmax(-1)
    with dropped_sources(DepthProbe(model), [(site, 1)]):
        _, _, output = states_of(model, ids)[site]
    assert torch.allclose(output, weights[0] * state.sources[0] + weights[1] * state.partial, atol=1e-6)


def test_dropping_the_newest_source_keeps_an_input_query():
    model, ids, site = random_depth_model("block", query="input"), random_ids(2, 7), 4
    state, reads, _ = states_of(model, ids)[site]
    module = depth_sites(DepthProbe(model))[site]
    with torch.no_grad(), dropped_sources(DepthProbe(model), [(site, 2)]):
        weight = module.inputs((*state.sources, state.partial), reads.value).score_weight
        keys = [v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in state.sources]
        shares = torch.stack([(weight * key).sum(-1) for key in keys], -1).softmax(-1)
        expected = sum(shares[..., i, None] * v for i, v in enumerate(state.sources))
    with dropped_sources(DepthProbe(model), [(site, 2)]):
        assert torch.allclose(states_of(model, ids)[site][-1], expected, atol=1e-5)


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
        ([(0, 0)], "site 0 would have no source left"),
        ([(1, 0), (1, 1)], "site 1 would have no source left"),
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
