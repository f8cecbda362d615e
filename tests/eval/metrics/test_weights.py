"""Mean depth weights, and mean mass on MoDA's slots."""

import pytest
import torch
from model_checks import randomise_depth
from tiny_hosts import NUM_LAYERS, random_ids, tiny_host_config

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.metrics.weights import mean_depth_weights, mean_slot_mass, site_names

MODA = {"connection": "residual", "depth_kv": "attention+mlp"}


def tiny_model(**fields) -> DepthAttnForCausalLM:
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), **fields))
    randomise_depth(model)
    return model


def test_means_equal_a_direct_computation_over_uneven_batches():
    model = tiny_model(sublayers_per_block=2, num_depth_heads=2).train()
    batches = [random_ids(3, 7), random_ids(1, 4)]
    table = mean_depth_weights(model, batches)
    assert model.training
    assert table.shape == (2 * NUM_LAYERS + 1, NUM_LAYERS + 1)
    model.eval()
    with torch.no_grad():
        outputs = [model(ids, output_depth_attentions=True).depth_attentions for ids in batches]
    for site in range(len(table)):
        tokens = torch.cat([output[site].flatten(0, 1) for output in outputs])  # [tokens, heads, sources]
        num_sources = tokens.shape[-1]
        assert torch.allclose(table[site, :num_sources], tokens.double().mean(dim=(0, 1)), atol=1e-6)
        assert table[site, num_sources:].isnan().all()


def test_zero_queries_read_uniformly():
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=3))
    table = mean_depth_weights(model, [random_ids(2, 5)])
    for row in table:
        known = row[row.isfinite()]
        assert torch.allclose(known, torch.full_like(known, 1 / len(known)), atol=1e-6)


@pytest.mark.parametrize(
    "fields, batches, message",
    [
        ({"connection": "residual"}, [random_ids(1, 4)], "residual"),
        ({}, [], "batches"),
    ],
    ids=["residual", "no batches"],
)
def test_nothing_to_measure_is_an_error(fields, batches, message):
    with pytest.raises(ValueError, match=message):
        mean_depth_weights(tiny_model(**fields), batches)


@pytest.mark.parametrize("fields", [MODA, {**MODA, "depth_gate": "head"}, {"depth_kv": "attention"}])
def test_slot_mass_equals_a_direct_computation_over_uneven_batches(fields):
    model = tiny_model(**fields).train()
    batches = [random_ids(3, 7), random_ids(1, 4)]
    mass = mean_slot_mass(model, batches)
    assert model.training and mass.shape == (NUM_LAYERS,) and mass[0].isnan()
    model.eval()
    with torch.no_grad():
        outputs = [model(ids, output_depth_attentions=True).depth_kv_attentions for ids in batches]
    for layer in range(1, NUM_LAYERS):
        tokens = torch.cat(
            [output[layer].transpose(1, 2).flatten(0, 1) for output in outputs]
        )  # [tokens, heads, slots]
        assert torch.allclose(mass[layer], tokens.double().sum(dim=-1).mean(), atol=1e-6)
    if "depth_gate" not in fields:
        assert (mass[1:] > 0).all() and (mass[1:] < 1).all()


def test_slot_mass_of_closed_gates_is_zero():
    model = DepthAttnForCausalLM(DepthAttnConfig.moda(tiny_host_config("llama"), depth_gate="head"))
    assert mean_slot_mass(model, [random_ids(2, 5)])[1:].tolist() == [0.0] * (NUM_LAYERS - 1)


def test_slot_mass_without_slots_or_batches_is_an_error():
    with pytest.raises(ValueError, match="depth_kv: None has no depth slots"):
        mean_slot_mass(tiny_model(), [random_ids(1, 4)])
    with pytest.raises(ValueError, match="batches"):
        mean_slot_mass(tiny_model(**MODA), [])


def test_site_names_follow_the_sites():
    names = site_names(NUM_LAYERS)
    assert names[:3] == ["attn 0", "mlp 0", "attn 1"]
    assert names[-1] == "output"
    assert len(names) == 2 * NUM_LAYERS + 1
