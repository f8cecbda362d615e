"""LayerDrop: the host in evaluation, and the distribution of the outputs in training."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_checks import depth_model
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model

from hf_depthattn import DepthAttnConfig
from hf_depthattn.depth_connections import depth_site


def site_of(probability):
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), connection="layer_drop", layer_drop=probability)
    return depth_site(config, 3)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "olmo2"])
def test_evaluation_is_the_host_to_the_bit(model_type):
    stock, ids = tiny_stock_model(model_type), random_ids(2, 9)
    model = depth_model(stock, connection="layer_drop", layer_drop=0.5)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(ids).logits, stock(ids).logits)


def test_forward_and_gradients_in_training_equal_the_equation():
    """Outputs are kept with the right probability, for the whole batch at once, and multiplied by its inverse."""
    torch.manual_seed(0)
    site, counts = site_of(0.25).train(), {0.0: 0, 4 / 3: 0}
    stream = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    output = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(stream)
    for _ in range(2000):
        mixed = site.write(site.begin(stream), output).partial
        scale = 0.0 if torch.equal(mixed, stream) else 4 / 3
        counts[scale] += 1
        if counts[scale] == 1:
            torch.testing.assert_close(mixed, stream + scale * output, rtol=1e-6, atol=1e-6)
            of_stream, of_output = torch.autograd.grad(mixed, (stream, output), cotangent)
            torch.testing.assert_close(of_stream, cotangent)
            torch.testing.assert_close(of_output, scale * cotangent, rtol=1e-6, atol=1e-6)
    # Five standard deviations of a binomial distribution with p = 1/4.
    assert abs(counts[0.0] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_sublayers_are_dropped_independently():
    torch.manual_seed(0)
    sites = [site_of(0.5).train() for _ in range(2)]
    stream, output = torch.zeros(1, 1, 32), torch.ones(1, 1, 32)
    drawn = {tuple(bool(site.write(site.begin(stream), output).partial.any()) for site in sites) for _ in range(100)}
    assert len(drawn) == 4


def test_probability_zero_is_the_host_in_training():
    site = site_of(0).train()
    stream, output = torch.randn(1, 2, 32), torch.randn(1, 2, 32)
    assert torch.equal(site.write(site.begin(stream), output).partial, stream + output)


@pytest.mark.parametrize("probability", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_probabilities_are_refused_by_name(probability):
    with pytest.raises(StrictDataclassError, match=f"layer_drop: {probability} must be at least 0 and less than 1"):
        site_of(probability)
