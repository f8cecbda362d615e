"""Skips, swaps and replacements in models of this package, against models that are built that way."""

import copy
from contextlib import ExitStack

import pytest
import torch
from depth_metric_models import (
    logits_of,
    random_depth_model,
    without_layer,
)
from model_checks import depth_model
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model

from hf_depthattn.eval.metrics.probing.interventions import MixSkip, SlotSkip
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.source_drop import depth_sites, skip_sublayer


def test_an_attn_res_swap_takes_the_right_boundary_along():
    model, ids = random_depth_model("full"), random_ids(2, 9)
    probe = DepthProbe(model)
    expected = copy.deepcopy(model)
    layers = DepthProbe(expected).layers
    first, second = layers[0], layers[1]
    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        one, other = getattr(first, name), getattr(second, name)
        setattr(first, name, other)
        setattr(second, name, one)
    # The MLP sites are 1 and 3, the sites after the layers 2 and 4.
    for parameter in expected.get_decoder().depth_reads.parameters():
        parameter.data = parameter.data[[0, 3, 4, 1, 2, 5, 6]]
    with probe.swap(0, 1), torch.no_grad():
        assert torch.equal(probe.logits(ids), DepthProbe(expected).logits(ids))
        assert torch.equal(model(ids).logits, logits_of(expected, ids))


def test_a_skipped_full_attn_res_layer_is_a_deleted_layer():
    model, ids = random_depth_model("full"), random_ids(2, 9)
    with DepthProbe(model).skip(1), torch.no_grad():
        assert torch.equal(model(ids).logits, logits_of(without_layer(model, 1), ids))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_skipped_attn_res_layer_leaves_the_other_blocks_as_they_were(size):
    model, ids = random_depth_model("block", sublayers_per_block=size), random_ids(2, 9)
    probe = DepthProbe(model)
    written = {}

    def see(sublayer, x, y):
        written[2 * sublayer.layer + (sublayer.kind == "mlp")] = y

    for skipped in range(NUM_LAYERS):
        banks = []
        out = model.get_decoder().layers[-1].out_depth
        handle = out.register_forward_pre_hook(lambda site, args, banks=banks: banks.append(args[0]))
        with handle, probe.skip(skipped), probe.observe_sublayers(see), torch.no_grad():
            embeddings = model.get_input_embeddings()(ids)
            model(ids)
        blocks = {}
        for site, y in written.items():
            if site // 2 != skipped:
                blocks.setdefault(site // size, []).append(y)
        expected = [embeddings, *(sum(outputs) for _, outputs in sorted(blocks.items()))]
        actual = (*banks[-1].sources, banks[-1].open_block)
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            assert torch.allclose(x, y, atol=1e-6)


def test_static_scores_keep_their_sources_when_a_layer_is_skipped():
    model, ids = random_depth_model("full", static_mix=True), random_ids(2, 9)
    given = []
    handle = (
        model.get_decoder().layers[-1].out_depth.register_forward_pre_hook(lambda site, args: given.append(args[0]))
    )
    with handle, DepthProbe(model).skip(1), torch.no_grad():
        model(ids)
    sources = (*given[0].sources, given[0].open_block)
    assert [bool(source.any()) for source in sources] == [True, True, True, False, False, True, True]


def test_the_newest_rule_reads_the_newest_source():
    model, ids = random_depth_model("full"), random_ids(2, 9)
    seen = []
    site = model.get_decoder().layers[2].attn_depth
    handle = site.register_forward_hook(lambda site, args, output: seen.append((args[0].open_block, output[0])))
    with handle, DepthProbe(model).skip(1, mix=MixSkip.NEWEST), torch.no_grad():
        model(ids)
    assert torch.equal(*seen[0])


def test_a_skipped_moda_layer_without_slots_is_a_deleted_layer():
    model, ids = random_depth_model("moda"), random_ids(2, 9)
    smaller = without_layer(model, 1)
    last = smaller.get_decoder().layers[1].depth_kv
    last.read = last.read[:2]
    with DepthProbe(model).skip(1, slots=SlotSkip.REMOVED), torch.no_grad():
        removed = model(ids).logits
    assert torch.equal(removed, logits_of(smaller, ids))
    given = []
    handle = model.get_decoder().layers[2].register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    with handle, DepthProbe(model).skip(1, slots=SlotSkip.ZERO), torch.no_grad():
        output = model(ids, output_depth_attentions=True)
    for slots in (given[0].depth_keys, given[0].depth_values):
        assert [bool(slot.any()) for slot in slots] == [True, True, False, False]
    assert not torch.equal(output.logits, removed)
    # Two slots with a logit of 0 have one weight, and it is not 0.
    weights = output.depth_kv_attentions[2]
    assert torch.allclose(weights[..., 2], weights[..., 3]) and (weights[..., 2] > 0).all()
    assert not torch.allclose(weights[..., 0], weights[..., 1])


@pytest.mark.parametrize("family", ["residual", "moda"])
def test_a_replaced_layer_gives_what_the_function_gives(family):
    model, ids = random_depth_model(family), random_ids(2, 9)
    probe, states = DepthProbe(model), []
    observed = probe.observe_states(lambda index, state: states.append(state))
    with torch.no_grad(), observed, probe.replace_layer(1, lambda state: 2 * state + 1):
        probe.logits(ids)
    assert torch.equal(states[2], 2 * states[1] + 1)


@pytest.mark.parametrize("skipped", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_skipped_attn_res_sublayer_is_no_source(size, skipped):
    """At zero queries every site reads the mean of the sources that hold something."""
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", sublayers_per_block=size)
    probe, ids = DepthProbe(model), random_ids(2, 9)
    reads, outputs = [], []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(skip_sublayer(probe, skipped))
        for site in depth_sites(probe):
            stack.enter_context(site.register_forward_hook(lambda site, args, output: reads.append(output[0])))
        stack.enter_context(probe.observe_sublayers(lambda sublayer, x, y: outputs.append(y)))
        model(ids)
        embeddings = model.get_input_embeddings()(ids)
    assert len(reads) == 2 * NUM_LAYERS + 1
    for site, read in enumerate(reads):
        blocks = {}
        for writer in range(site):
            if writer != skipped:
                blocks.setdefault(writer // size, []).append(outputs[writer])
        sources = [embeddings, *(sum(block) for block in blocks.values())]
        assert torch.allclose(read, sum(sources) / len(sources), atol=1e-6), site
