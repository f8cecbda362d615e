"""Usefulness against least squares."""

import pytest
import torch
from depth_metric_models import (
    close,
    loss_by_hand,
    random_depth_model,
    run_by_hand,
    sublayers_by_hand,
)
from tiny_hosts import NUM_LAYERS, VOCAB_SIZE, random_ids, tiny_stock_model
from torch import nn

from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.metrics.usefulness import usefulness


def uneven_model():
    """Weights large enough that no layer is nearly affine."""
    model = tiny_stock_model("llama")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.mul_(6)
    return model


class Affine(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.linear(hidden_states)


def test_an_affine_layer_has_the_ratio_one():
    model = uneven_model()
    model.model.layers[1] = Affine(model.config.hidden_size)
    result = usefulness(model, random_ids(8, 24), level="layer", ridge=1e-12)
    assert abs(result.ratios[1] - 1) <= 1e-6 and abs(result.increments[1]) <= 1e-5
    assert (result.ratios[[0, 2]] - 1).abs().min() >= 1e-4
    assert result.num_fit_tokens == 4 * 24 and result.num_unknowns == 33


def test_usefulness_equals_least_squares():
    model, ids = uneven_model(), random_ids(8, 24)
    result = usefulness(model, TextBatches(ids, batch_size=3), level="layer", ridge=1e-12, threshold=1.0)
    with torch.no_grad():
        fitted = run_by_hand(model, ids[::2])[0]
        loss = loss_by_hand(run_by_hand(model, ids[1::2])[1], ids[1::2])
        for index in range(NUM_LAYERS):
            x = nn.functional.pad(fitted[index].double().flatten(0, 1), (0, 1), value=1.0)
            weight = torch.linalg.lstsq(x, fitted[index + 1].double().flatten(0, 1)).solution.float()
            layers = list(model.model.layers)
            layers[index] = lambda state, weight=weight, **kwargs: state @ weight[:-1] + weight[-1]
            expected = loss_by_hand(run_by_hand(model, ids[1::2], layers)[1], ids[1::2])
            assert close(result.ratios[index], expected / loss, 1e-4)
            assert close(result.increments[index], expected - loss, 1e-3)
    assert result.score == sum(result.is_useful) / 3
    assert result.is_useful == tuple((result.ratios > 1).tolist())


def test_sublayer_form_maps_inputs_to_outputs():
    model, ids = uneven_model(), random_ids(8, 24)
    result = usefulness(model, ids, level="sublayer", ridge=1e-12)
    assert result.names == ("attn 0", "mlp 0", "attn 1", "mlp 1", "attn 2", "mlp 2")
    with torch.no_grad():
        x, y = sublayers_by_hand(model, ids[::2])[5]
        rows = nn.functional.pad(x.double().flatten(0, 1), (0, 1), value=1.0)
        weight = torch.linalg.lstsq(rows, y.double().flatten(0, 1)).solution.float()
        h = sublayers_by_hand(model, ids[1::2])[5][0]
        logits = model.lm_head(model.model.norm(h + h @ weight[:-1] + weight[-1]))
        loss = loss_by_hand(run_by_hand(model, ids[1::2])[1], ids[1::2])
    assert close(result.increments[5], loss_by_hand(logits, ids[1::2]) - loss, 1e-3)


def test_usefulness_is_scored_on_sequences_that_were_not_fitted():
    """With fewer rows than unknowns the fit is exact on its own rows and on no others."""
    # No token twice: equal embeddings cannot be mapped to different outputs.
    model, ids = uneven_model(), torch.randperm(VOCAB_SIZE)[:48].view(4, 12)
    in_sample = usefulness(model, ids.repeat_interleave(2, 0)[:4], level="layer")
    out_of_sample = usefulness(model, ids, level="layer")
    assert in_sample.num_fit_tokens < in_sample.num_unknowns
    assert in_sample.ratios.sub(1).abs().max() <= 1e-3
    assert out_of_sample.ratios.sub(1).abs().max() >= 1e-2


@pytest.mark.parametrize("family", ["block", "block+moda"])
def test_layer_form_needs_a_residual_stream(family):
    with pytest.raises(ValueError, match=r"level: 'layer' needs .*connection='attn_res'"):
        usefulness(random_depth_model(family), random_ids(2, 6), level="layer")
