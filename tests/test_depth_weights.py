"""Mean depth weights and their heat map."""

import pytest
import torch
from model_checks import randomise_depth
from tiny_hosts import NUM_LAYERS, random_ids, tiny_host_config

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.depth_weights import mean_depth_weights, save_heat_map, site_names


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


def test_heat_map_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    table = mean_depth_weights(tiny_model(sublayers_per_block=1), [random_ids(2, 5)])
    save_heat_map(table, tmp_path / "weights.png", "title")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_site_names_follow_the_sites():
    names = site_names(NUM_LAYERS)
    assert names[:3] == ["attn 0", "mlp 0", "attn 1"]
    assert names[-1] == "output"
    assert len(names) == 2 * NUM_LAYERS + 1
