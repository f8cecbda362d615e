"""`DepthProbe`: skip, swap, replace, states and readout against models that are built that way."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from depth_metric_models import (
    DEPTH_FAMILIES,
    EVERY_CONNECTION,
    HOST_FAMILIES,
    connection_model,
    family_model,
    logits_of,
    loss_by_hand,
    random_depth_model,
    run_by_hand,
    traces,
    without_layer,
)
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.depth_weights import depth_weights
from hf_depthattn.eval.metrics.probing.interventions import MixSkip, SlotSkip
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.source_drop import skip_sublayer, source_drop
from hf_depthattn.eval.metrics.usefulness import usefulness


@pytest.mark.parametrize("model_type", HOST_FAMILIES)
def test_a_skipped_layer_is_a_deleted_layer_bit_for_bit(model_type):
    model, ids = family_model(model_type), random_ids(2, 11)
    probe, whole = DepthProbe(model), logits_of(model, ids)
    for layer in range(NUM_LAYERS):
        with probe.skip(layer), torch.no_grad():
            skipped = probe.logits(ids)
        assert torch.equal(skipped, logits_of(without_layer(model, layer), ids))
        assert not torch.equal(skipped, whole)
    assert torch.equal(logits_of(model, ids), whole)


@pytest.mark.parametrize("model_type", HOST_FAMILIES)
def test_the_last_state_reads_out_as_the_model(model_type):
    model, ids = family_model(model_type), random_ids(2, 11)
    probe, states = DepthProbe(model), []
    with torch.no_grad(), probe.observe_states(lambda index, state: states.append((index, state))):
        logits = probe.logits(ids)
    assert [index for index, _ in states] == list(range(NUM_LAYERS + 1))
    hidden = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    # The last entry is behind the final norm. Mamba's first is the output of layer 0.
    first = 1 if model_type == "mamba2" else 0
    for (_, state), expected in zip(states[first:-1], hidden, strict=False):
        assert torch.equal(state, expected)
    with torch.no_grad():
        assert torch.equal(probe.readout(states[-1][1]), logits)
        assert not torch.equal(probe.readout(states[0][1]), logits)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_a_swap_of_weights_is_a_swap_of_layers(model_type):
    model, ids = family_model(model_type), random_ids(2, 11)
    probe, whole = DepthProbe(model), logits_of(model, ids)
    swapped = copy.deepcopy(model)
    layers = DepthProbe(swapped).layers
    layers[0], layers[2] = layers[2], layers[0]
    before = traces(model)
    with probe.swap(0, 2), torch.no_grad():
        assert torch.equal(probe.logits(ids), logits_of(swapped, ids))
    assert torch.equal(logits_of(model, ids), whole) and traces(model) == before


def test_a_swap_of_layers_with_other_shapes_is_an_error():
    model = tiny_stock_model("llama")
    model.model.layers[1].mlp = copy.deepcopy(tiny_stock_model("llama", intermediate_size=48).model.layers[1].mlp)
    probe = DepthProbe(model)
    assert probe.can_swap(0, 2) and not probe.can_swap(0, 1)
    with pytest.raises(ValueError, match="layers 0 and 1 have different weights"), probe.swap(0, 1):
        pass


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2", "olmo2"])
def test_a_replaced_sublayer_gives_what_the_function_gives(model_type):
    """Granite multiplies what sublayers return; Gemma 2 and OLMo 2 norm it."""
    model, ids = tiny_stock_model(model_type), random_ids(2, 9)
    probe, states, inputs = DepthProbe(model), [], []
    observed = probe.observe_states(lambda index, state: states.append(state))

    def function(x):
        inputs.append(x)
        return 2 * x + 1

    with torch.no_grad(), observed, probe.replace_sublayer(probe.sublayers[3], function):
        probe.logits(ids)
    # The MLP of layer 1: the state behind it is its input and the output.
    assert torch.allclose(states[2], inputs[0] + (2 * inputs[0] + 1), rtol=1e-5, atol=1e-5)


def test_a_skipped_sublayer_of_a_stock_model_adds_nothing():
    model, ids = tiny_stock_model("llama"), random_ids(2, 9)
    probe = DepthProbe(model)
    bare = copy.deepcopy(model)
    nn.init.zeros_(bare.model.layers[1].mlp.down_proj.weight)
    with skip_sublayer(probe, 3), torch.no_grad():
        assert torch.equal(probe.logits(ids), logits_of(bare, ids))


def test_the_loss_is_the_mean_over_all_tokens_of_uneven_batches():
    model, ids = tiny_stock_model("llama"), random_ids(5, 9)
    with torch.no_grad():
        loss = DepthProbe(model).loss(TextBatches(ids, batch_size=2))
        expected = loss_by_hand(run_by_hand(model, ids)[1], ids)
    assert abs(loss - expected) <= 1e-6


class TupleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states), "attention weights"


class TupleModel(nn.Module):
    """Remote code in the style of transformers 4: layers return tuples, called by keyword."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=3)
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.blocks = nn.ModuleList([TupleLayer() for _ in range(3)])

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, use_cache):
        state = self.embedding(ids)
        for block in self.blocks:
            state = block(hidden_states=state)[0]
        return SimpleNamespace(logits=self.head(state))


@torch.no_grad()
def test_layers_that_return_tuples():
    model, ids = TupleModel(), torch.arange(6).view(2, 3)
    probe, states = DepthProbe(model), []
    with probe.observe_states(lambda index, state: states.append(state)), probe.skip(1):
        logits = probe.logits(ids)
    assert torch.equal(states[0], model.embedding(ids)) and torch.equal(states[1], states[2])
    assert torch.equal(states[3], model.blocks[2](model.blocks[0](states[0])[0])[0])
    assert torch.equal(logits, model.head(states[3])) and torch.equal(probe.readout(states[1]), model.head(states[1]))


def test_every_forward_pass_is_reported():
    calls = []
    probe = DepthProbe(tiny_stock_model("llama"), on_forward=lambda: calls.append(1))
    with torch.no_grad():
        probe.loss(TextBatches(random_ids(5, 6), batch_size=2))
    assert len(calls) == probe.num_forwards == 3


class Broken(Exception):
    pass


def states_under(probe, ids, *changes):
    """States z_0 .. z_L and logits of one pass under some changes."""
    states = {}
    with ExitStack() as stack, torch.no_grad():
        for change in changes:
            stack.enter_context(change)
        with probe.observe_states(states.__setitem__):
            logits = probe.logits(ids)
    return [states[index] for index in range(len(states))], logits


@pytest.mark.parametrize("depth_kv", [None, "attention+mlp"])
@pytest.mark.parametrize("connection", EVERY_CONNECTION)
def test_states_of_every_connection_are_what_layers_map(connection, depth_kv):
    model, ids = connection_model(connection, depth_kv=depth_kv), random_ids(2, 7)
    probe, before = DepthProbe(model), traces(model)
    moda = "moda" if connection == "residual" else f"{connection}+moda"
    assert probe.family == (connection if depth_kv is None else moda)
    states, logits = states_under(probe, ids)
    assert len(states) == NUM_LAYERS + 1 and len({state.shape for state in states}) == 1
    assert states[0].shape[-1] == 32 * (model.config.num_streams if probe.has_streams else 1)
    with torch.no_grad():
        assert torch.equal(probe.readout(states[-1]), logits)
    for layer in range(NUM_LAYERS):
        skipped, changed = states_under(probe, ids, probe.skip(layer))
        assert all(map(torch.equal, skipped[: layer + 1], states[: layer + 1]))
        if probe.maps_states:
            assert torch.equal(skipped[layer], skipped[layer + 1])
            replaced, _ = states_under(probe, ids, probe.replace_layer(layer, lambda z: 2 * z.flip(-1)))
            assert torch.equal(replaced[layer + 1], 2 * replaced[layer].flip(-1))
        assert not torch.equal(changed, logits)
        with torch.no_grad():
            assert torch.equal(probe.readout(skipped[-1]), changed)
    assert traces(model) == before


@pytest.mark.parametrize("connection", EVERY_CONNECTION)
def test_a_swap_moves_the_sites_of_a_stream_and_the_next_site_of_sources(connection):
    model, ids = connection_model(connection), random_ids(2, 7)
    probe = DepthProbe(model)
    if not probe.maps_states:
        pytest.skip("the swap of connections with sources is tested with AttnRes")
    expected = copy.deepcopy(model)
    one, other = expected.get_decoder().layers[:2]
    for name, child in list(one.named_children()):
        if name in ("out_depth", "rotary_emb") or getattr(other, name, None) is None:
            continue
        mine, theirs = dict(child.named_parameters()), dict(getattr(other, name).named_parameters())
        for key in mine.keys() & theirs.keys():
            mine[key].data, theirs[key].data = theirs[key].data, mine[key].data
        if hasattr(child, "input_scale"):
            child.input_scale, getattr(other, name).input_scale = getattr(other, name).input_scale, child.input_scale
    whole = states_under(probe, ids)[1]
    swapped = states_under(probe, ids, probe.swap(0, 1))[1]
    assert torch.equal(swapped, states_under(DepthProbe(expected), ids)[1]) and not torch.equal(swapped, whole)
    assert torch.equal(states_under(probe, ids)[1], whole)


@pytest.mark.parametrize("connection", EVERY_CONNECTION)
def test_metrics_that_a_connection_does_not_have_name_it(connection):
    probe, ids = DepthProbe(connection_model(connection)), random_ids(2, 5)
    if connection != "attn_res":
        for metric in (depth_weights, lambda *given: source_drop(*given, drops=[(1, 0)])):
            with pytest.raises(ValueError, match=f"connection: a '{connection}' model has no depth weights"):
                metric(probe, ids)
    if not probe.maps_states:
        with pytest.raises(ValueError, match=f"level: 'layer' needs .*connection='{connection}'"):
            usefulness(probe, ids, level="layer")


def _interventions(probe):
    yield probe.skip(1)
    yield probe.observe_states(lambda index, state: None)
    yield probe.observe_sublayers(lambda sublayer, x, y: None)
    yield probe.replace_sublayer(probe.sublayers[2], torch.zeros_like)
    yield probe.swap(0, 1)
    yield probe.evaluation()
    yield skip_sublayer(probe, 0)
    if not probe.mixes_sources:
        yield probe.replace_layer(1, lambda state: state)
    if probe.has_slots:
        yield probe.skip(1, slots=SlotSkip.REMOVED)
    if probe.mixes_sources:
        yield probe.skip(1, mix=MixSkip.NEWEST)


@pytest.mark.parametrize("family", ["stock", *DEPTH_FAMILIES])
def test_nothing_is_left_behind_after_an_exception(family):
    model = tiny_stock_model("llama") if family == "stock" else random_depth_model(family)
    model.train()
    model.get_input_embeddings().eval()
    before = traces(model)
    probe = DepthProbe(model)
    count = 0
    for intervention in _interventions(probe):
        with pytest.raises(Broken), intervention:
            assert traces(model) != before, "the intervention is visible while it lasts"
            raise Broken
        assert traces(model) == before
        count += 1
    assert count >= 7


def test_a_failing_layer_leaves_nothing_behind():
    model, ids = tiny_stock_model("llama"), random_ids(2, 5)
    probe, before = DepthProbe(model), traces(model)

    def fail(state):
        raise Broken

    with pytest.raises(Broken), probe.replace_layer(1, fail):
        probe.logits(ids)
    assert traces(model) == before


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)])], ids=["linear", "list"])
def test_a_model_without_decoder_layers_is_one_clear_error(model):
    with pytest.raises(ValueError, match="has no decoder layers") as error:
        DepthProbe(model)
    assert "\n" not in str(error.value)


def test_a_stock_model_with_its_layers_taken_away_is_the_same_error():
    model = tiny_stock_model("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no decoder layers"):
        DepthProbe(model)
