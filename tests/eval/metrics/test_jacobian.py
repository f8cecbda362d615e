"""The Jacobian gap against whole Jacobians."""

import torch
from depth_metric_models import (
    run_by_hand,
)
from tiny_hosts import NUM_LAYERS, random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.jacobian import jacobian_gap
from hf_depthattn.eval.metrics.probing.text import TextBatches


def flat(result):
    """All numbers of a result but its cost."""
    tensors = [value for value in vars(result).values() if isinstance(value, torch.Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_a_seed_decides_the_random_vectors(model, text):
    first, again, other = (jacobian_gap(model, text, num_probes=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(first.jacobian_identity_gap, other.jacobian_identity_gap)
    assert not torch.equal(first.mean_jacobian_identity_gap, other.mean_jacobian_identity_gap)


def full_jacobian(model, ids, layer):
    """[T D, T D] of one layer of a stock llama on one sequence."""
    with torch.no_grad():
        state = run_by_hand(model, ids)[0][layer]
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(state, positions)

    def run(x):
        return model.model.layers[layer](x, attention_mask=None, position_ids=positions, position_embeddings=rotary)

    return torch.autograd.functional.jacobian(run, state)[0, :, :, 0]  # [T, D, T, D]


def test_jacobian_gap():
    model = tiny_stock_model("llama", dtype=torch.float64)
    ids = random_ids(3, 4)
    result = jacobian_gap(model, TextBatches(ids, batch_size=2), num_probes=150)
    length, width = ids.shape[1], model.config.hidden_size
    identity = torch.eye(length * width, dtype=torch.float64)
    for layer in range(NUM_LAYERS):
        squares, mean = [], torch.zeros(width, width, dtype=torch.float64)
        for row in ids:
            jacobian = full_jacobian(model, row[None], layer)
            difference = jacobian.reshape(length * width, length * width) - identity
            squares.append(difference.square().sum() / (length * width**2))
            mean += jacobian.sum(0).mean(1) / len(ids)
        expected = torch.stack(squares).mean().sqrt()
        assert abs(result.jacobian_identity_gap[layer] / expected - 1) <= 5 * result.relative_errors[layer]
        assert 0 < result.relative_errors[layer] <= 0.02
        expected_mean = (mean - torch.eye(width, dtype=torch.float64)).norm() / width
        assert abs(result.mean_jacobian_identity_gap[layer] / expected_mean - 1) <= 0.08


def test_the_relative_error_of_the_gap_is_its_spread_over_seeds(model, text):
    results = [jacobian_gap(model, text, num_probes=4, include_mean=False, seed=seed) for seed in range(20)]
    gaps = torch.stack([result.jacobian_identity_gap for result in results])
    claimed = torch.stack([result.relative_errors for result in results]).mean(0)
    ratio = claimed / (gaps.std(0) / gaps.mean(0))
    assert (ratio > 0.4).all() and (ratio < 2.5).all()
    assert results[0].mean_jacobian_identity_gap.isnan().all()


def test_an_identity_layer_has_no_gap(model, text):
    class Through(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states.clone()

    changed = tiny_stock_model("llama")
    changed.model.layers[1] = Through()
    result = jacobian_gap(changed, text, num_probes=1)
    assert result.jacobian_identity_gap[1] == 0 and result.mean_jacobian_identity_gap[1] == 0
    assert (result.jacobian_identity_gap[[0, 2]] > 0).all()
