"""Every depth metric of any model against a direct computation on a tiny llama."""

import itertools
import math

import pytest
import torch
from depth_metric_models import (
    close,
    loss_by_hand,
    random_depth_model,
    run_by_hand,
    sublayers_by_hand,
    traces,
)
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.causal import causal_scores
from hf_depthattn.eval.metrics.gradients import gradient_magnitude
from hf_depthattn.eval.metrics.jacobian import jacobian_gap
from hf_depthattn.eval.metrics.logit_lens import logit_lens
from hf_depthattn.eval.metrics.permutation import permutation_scores
from hf_depthattn.eval.metrics.states import (
    angular_distance,
    block_influence,
    output_magnitude,
    output_variance,
    relative_contribution,
)
from hf_depthattn.eval.metrics.text import TextBatches
from hf_depthattn.eval.metrics.usefulness import usefulness


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_stock_model("llama")


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(1)
    return TextBatches(random_ids(5, 12), batch_size=2)


@pytest.fixture(scope="module")
def states(model, text):
    with torch.no_grad():
        return [state.double() for state in run_by_hand(model, text.ids)[0]]


@pytest.fixture(scope="module")
def sublayers(model, text):
    with torch.no_grad():
        return [(x.double(), y.double()) for x, y in sublayers_by_hand(model, text.ids)]


def cosine(x, y):
    return torch.cosine_similarity(x, y, dim=-1)


def test_angular_distance(model, text, states):
    result = angular_distance(model, text)
    last = angular_distance(model, text, tokens="last")
    for i in range(NUM_LAYERS + 1):
        for j in range(NUM_LAYERS + 1):
            angles = cosine(states[i], states[j]).clamp(-1, 1).arccos() / math.pi
            assert close(result.distances[i, j], angles.mean() if j > i else math.nan)
            assert close(last.distances[i, j], angles[:, -1].mean() if j > i else math.nan)
    assert close(result.adjacent, [result.distances[i, i + 1] for i in range(NUM_LAYERS)])


def test_block_influence(model, text, states):
    expected = [1 - cosine(x, y).mean() for x, y in itertools.pairwise(states)]
    assert close(block_influence(model, text).scores, expected)


def test_output_variance(model, text, states, sublayers):
    result = output_variance(model, text)
    assert close(result.states, [x.var(-1).mean() for x in states])
    assert close(result.sublayers, [y.var(-1).mean() for _, y in sublayers])


def test_output_magnitude(model, text, states, sublayers):
    result = output_magnitude(model, text)
    assert close(result.states, [x.square().mean(-1).sqrt().mean() for x in states])
    assert close(result.sublayers, [y.square().mean(-1).sqrt().mean() for _, y in sublayers])
    assert result.sources is None


def test_magnitude_of_sources_is_that_of_block_sums():
    model, ids = random_depth_model("block"), random_ids(3, 7)
    seen = []
    site = model.get_decoder().layers[-1].out_depth
    with torch.no_grad(), site.register_forward_pre_hook(lambda site, args: seen.append(args[0])):
        model(ids)
    sources = torch.stack([*seen[0].sources, seen[0].partial]).double()
    result = output_magnitude(model, TextBatches(ids, batch_size=2))
    assert close(result.sources, sources.square().mean(-1).sqrt().mean((1, 2)))


def test_relative_contribution(model, text, states, sublayers):
    result = relative_contribution(model, text)
    for layer in range(NUM_LAYERS):
        stream, change = states[layer], states[layer + 1] - states[layer]
        assert close(result.layers[layer], (change.norm(dim=-1) / stream.norm(dim=-1)).mean())
        assert close(result.layer_cosines[layer], cosine(change, stream).mean())
    assert close(result.sublayers, [(y.norm(dim=-1) / x.norm(dim=-1)).mean() for x, y in sublayers])
    assert close(result.sublayer_cosines, [cosine(x, y).mean() for x, y in sublayers])


def test_causal_scores(model, text, states):
    result = causal_scores(model, text)
    layers = list(model.model.layers)
    with torch.no_grad():
        loss = loss_by_hand(run_by_hand(model, text.ids)[1], text.ids)
        for s in range(NUM_LAYERS):
            changed, logits = run_by_hand(model, text.ids, layers[:s] + layers[s + 1 :])
            changed.insert(s + 1, changed[s])
            assert close(result.loss_increase[s], loss_by_hand(logits, text.ids) - loss)
            for later in range(NUM_LAYERS):
                update = states[later + 1] - states[later]
                difference = (changed[later + 1] - changed[later] - update).norm(dim=-1)
                expected = difference.mean() / update.norm(dim=-1).mean()
                assert close(result.scores[s, later], expected if later > s else math.nan, 1e-4)
                expected = (difference / update.norm(dim=-1)).mean()
                assert close(result.token_scores[s, later], expected if later > s else math.nan, 1e-4)
    assert close(result.mean, sum(result.scores[i, j] for i, j in [(0, 1), (0, 2), (1, 2)]) / 3)
    assert close(result.per_skipped[0], result.scores[0, 1:].mean()) and result.per_skipped[-1].isnan()


def test_causal_scores_of_sublayers(model, text, sublayers):
    result = causal_scores(model, text, level="sublayer")
    assert result.names[:2] == ("attn 0", "mlp 0") and result.scores.shape == (2 * NUM_LAYERS, 2 * NUM_LAYERS)
    bare = tiny_stock_model("llama")
    bare.load_state_dict(model.state_dict())
    nn.init.zeros_(bare.model.layers[0].mlp.down_proj.weight)
    with torch.no_grad():
        changed = sublayers_by_hand(bare, text.ids)
    for later in range(2, 2 * NUM_LAYERS):
        y = sublayers[later][1]
        expected = (changed[later][1] - y).norm(dim=-1).mean() / y.norm(dim=-1).mean()
        assert close(result.scores[1, later], expected, 1e-4)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
def test_permutation_scores(model, text, pairs):
    result = permutation_scores(model, text, pairs=pairs)
    with torch.no_grad():
        loss = loss_by_hand(run_by_hand(model, text.ids)[1], text.ids)
        expected = {}
        for i, j in [(0, 1), (1, 2), (0, 2)][: 3 if pairs == "all" else 2]:
            layers = list(model.model.layers)
            layers[i], layers[j] = layers[j], layers[i]
            expected[i, j] = loss_by_hand(run_by_hand(model, text.ids, layers)[1], text.ids) - loss
    for (i, j), increase in expected.items():
        assert close(result.loss_increase[i, j], increase) and close(result.scores[j, i], abs(increase) / loss)
    assert result.num_pairs == len(expected) == result.scores.isfinite().sum() / 2
    assert close(result.mean, sum(map(abs, expected.values())) / loss / len(expected))
    # With three layers every pair has the first or the last.
    assert math.isnan(result.inner_mean) and result.edge_mean == result.mean


def test_inner_pairs_are_reported_apart():
    model = tiny_stock_model("llama", num_hidden_layers=4)
    result = permutation_scores(model, random_ids(2, 6), pairs="all")
    assert result.inner_mean == result.scores[1, 2].item()
    assert result.num_pairs == 6
    assert abs(6 * result.mean - (5 * result.edge_mean + result.inner_mean)) <= 1e-9


def test_layers_of_other_shapes_are_left_out():
    model = tiny_stock_model("llama")
    model.model.layers[2].mlp = tiny_stock_model("llama", intermediate_size=48).model.layers[2].mlp
    result = permutation_scores(model, random_ids(2, 6), pairs="all")
    assert (result.num_pairs, result.num_unfit_pairs) == (1, 2) and result.scores[0, 2].isnan()


def test_logit_lens(model, text, states):
    result = logit_lens(model, text)
    with torch.no_grad():
        logits = [model.lm_head(model.model.norm(state.float())).double() for state in states]
    final = logits[-1].log_softmax(-1)
    for index, row in enumerate(logits):
        assert close(result.cross_entropy[index], loss_by_hand(row, text.ids))
        assert close(result.kl[index], (final.exp() * (final - row.log_softmax(-1))).sum(-1).mean())
        overlap = [
            len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
            for a, b in zip(row.flatten(0, 1), final.flatten(0, 1), strict=True)
        ]
        assert close(result.top5_overlap[index], sum(overlap) / len(overlap))
    assert result.kl[-1] == 0 and result.top5_overlap[-1] == 1


def test_gradient_magnitude(model):
    ids = random_ids(4, 8)
    result = gradient_magnitude(model, TextBatches(ids, batch_size=2))
    layers = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    outputs = torch.zeros(NUM_LAYERS, dtype=torch.float64)
    for part in ids.split(2):
        states, logits = run_by_hand(model, part)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        # Behind the MLP the state is a sum: its gradient is that of the MLP's output.
        found = torch.autograd.grad(loss, states[1:], retain_graph=True)
        outputs += torch.stack([g.double().norm() for g in found])
        for index, layer in enumerate(model.model.layers):
            found = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
            layers[index] += torch.cat([g.flatten() for g in found]).double().norm()
    assert close(result.layer_parameters, layers / 2)
    assert close(result.sublayer_outputs[1::2], outputs / 2)
    assert result.depth_parameters.isnan().all() and result.batch_tokens == 16


def test_gradients_of_frozen_and_depth_parameters():
    model, ids = random_depth_model("block"), random_ids(2, 8)
    free = gradient_magnitude(model, ids)
    model.requires_grad_(False)
    before = traces(model)
    frozen = gradient_magnitude(model, ids)
    assert traces(model) == before
    assert close(frozen.layer_parameters, free.layer_parameters) and (free.depth_parameters > 0).all()
    loss = nn.functional.cross_entropy
    model.requires_grad_(True)
    logits = model(ids).logits
    queries = [p for name, p in model.get_decoder().layers[1].named_parameters() if "_depth." in name]
    found = torch.autograd.grad(loss(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), queries)
    assert close(free.depth_parameters[1], torch.cat(found).double().norm())


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: usefulness(model, ids, level="block"),
        lambda model, ids: usefulness(model, ids[:1]),
        lambda model, ids: causal_scores(model, ids, level="block"),
        lambda model, ids: permutation_scores(model, ids, pairs="some"),
        lambda model, ids: angular_distance(model, ids, tokens="first"),
        lambda model, ids: jacobian_gap(model, ids, num_probes=0),
        lambda model, ids: logit_lens(model, []),
        lambda model, ids: logit_lens(model, ids[0]),
    ],
    ids=["level", "halves", "causal level", "pairs", "tokens", "probes", "empty", "one-dimensional"],
)
def test_wrong_arguments_are_named(model, call):
    with pytest.raises(ValueError, match=r"got|needs|give at least|no two halves"):
        call(model, random_ids(2, 6))
