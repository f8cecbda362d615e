"""DenseFormer against a slow reference and golden values of the authors' code, and as the host at the start."""

import pytest
import torch
from model_checks import depth_model
from site_networks import (
    assert_all_close,
    filled_sites,
    gradients,
    initial_sites,
    linear_sublayers,
    run_sites,
    site_config,
    wave,
)
from tiny_hosts import random_ids, tiny_stock_model

D = 5
LAYERS = 3


def slow_network(sites, sublayers, embeddings):
    """Eq. 1 with a sum over single numbers: `p = sum_j a_lj X_j` after layer l."""
    states, p = [embeddings], embeddings
    for layer in range(LAYERS):
        x = p + sublayers[2 * layer](p)
        states.append(x + sublayers[2 * layer + 1](x))
        weight = sites[2 * layer + 1].average.weight
        p = torch.einsum("j,jbtd->btd", weight, torch.stack(states))
    return p


def test_forward_and_every_gradient_equal_the_slow_reference():
    sites = filled_sites(site_config(D, LAYERS, connection="dense_former"))
    sublayers = linear_sublayers(D, 2 * LAYERS)
    embeddings = wave(2, 3, D, phase=0.2).requires_grad_()
    wanted = [embeddings, *sublayers.parameters(), *sites.parameters()]
    actual, expected = run_sites(sites, sublayers, embeddings), slow_network(sites, sublayers, embeddings)
    assert_all_close([actual], [expected], rtol=1e-13)
    assert_all_close(gradients(actual, wanted), gradients(expected, wanted), rtol=1e-12)


def test_golden_values_of_the_authors_code():
    """`DWAModules` of epfml/DenseFormer (commit c99a623)."""
    sites = filled_sites(site_config(3, 3, connection="dense_former"))
    embeddings = wave(1, 2, 3, phase=0.2).requires_grad_()
    output = run_sites(sites, linear_sublayers(3, 6), embeddings)
    weights = [site.average.weight for site in sites[1:-1:2]]
    found = [output.flatten(), *(gradient.flatten() for gradient in gradients(output, [embeddings, *weights]))]
    golden = [
        [0.617937205098, 0.00907964461412, -1.01247079466, -0.33394231591, 1.16300357676, 0.796970274372],
        [-0.0343930121925, 0.63594646421, -0.129483388968, -0.276882410703, 0.196443247552, 0.226261148925],
        [-0.358534197792, -2.47728554366],
        [-0.68933708804, -1.41188179401, -1.16318828988],
        [1.94705123643, 5.76001896011, 2.12909005744, 0.790094429563],
    ]
    assert_all_close(found, [torch.tensor(numbers, dtype=torch.float64) for numbers in golden], rtol=1e-11)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma2"])
def test_initial_model_is_its_host_to_the_bit(model_type):
    stock = tiny_stock_model(model_type)
    model = depth_model(stock, connection="dense_former")
    ids = random_ids(2, 11)
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_mlp_sites_have_one_weight_for_the_embedding_and_each_layer():
    sites = initial_sites(site_config(D, LAYERS, connection="dense_former"))
    assert [sum(p.numel() for p in site.parameters()) for site in sites] == [0, 2, 0, 3, 0, 4, 0]


def test_layers_share_their_states():
    """A model keeps the embedding and one tensor per layer, not one per pair of layers."""
    sites = filled_sites(site_config(D, LAYERS, connection="dense_former"))
    state, states = sites[0].begin(wave(1, 2, D)), []
    for site in sites[:-1]:
        state = site.write(state, wave(1, 2, D))
        states.append(state)
    assert len({id(source) for state in states for source in state.sources}) == LAYERS + 1


def test_sums_are_float32_in_bfloat16_models():
    """Weights such as 1.003, which bfloat16 does not have, are not rounded to 1."""
    sites = initial_sites(site_config(D, 1, connection="dense_former"))
    with torch.no_grad():
        sites[1].average.weight.copy_(torch.tensor([-1.0, 1.003]))
    state = torch.full((1, 2, D), 512.0, dtype=torch.bfloat16)
    mixed = sites[1].average((state, state))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), torch.full((1, 2, D), 0.003 * 512), rtol=4e-3, atol=0)


def test_no_float32_copies_of_the_states_are_kept_for_backward():
    """L^2 / 2 of them would take more memory than the model."""
    average = initial_sites(site_config(D, LAYERS, connection="dense_former"))[2 * LAYERS - 1].average
    states = tuple(torch.randn(1, 2, D, dtype=torch.bfloat16).requires_grad_() for _ in range(LAYERS + 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        average(states)
    assert {tensor.dtype for tensor in kept if tensor.dim()} == {torch.bfloat16}
