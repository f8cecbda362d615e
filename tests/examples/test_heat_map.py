"""The heat map of depth weights."""

import pytest
from model_checks import randomise_depth
from tiny_hosts import random_ids, tiny_host_config

from examples.heat_map import save_heat_map
from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.eval.metrics.weights import mean_depth_weights


def tiny_model(**fields) -> DepthAttnForCausalLM:
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), **fields))
    randomise_depth(model)
    return model


def test_heat_map_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    table = mean_depth_weights(tiny_model(sublayers_per_block=1), [random_ids(2, 5)])
    save_heat_map(table, tmp_path / "weights.png", "title")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
