"""Parameters of stages and of tensor-parallel devices are counted as the models have them."""

import pytest
from depth_forms import random_model

from hf_depthattn.distributed.parameter_counts import count_parameters
from hf_depthattn.distributed.stage_building import stage_from_config
from hf_depthattn.distributed.stage_plan import loop_ranks, plan_stages, split_layers

MODA = {"sublayers_per_block": 3, "depth_kv": "attention+mlp", "depth_gate": "head"}
CASES = {
    "llama, Block 3 + MoDA": ("llama", {}, MODA),
    "tied": ("llama", {"tie_word_embeddings": True}, {"sublayers_per_block": 1}),
    "MoE": ("qwen3_moe", {}, {"sublayers_per_block": 2}),
    "shared experts": ("deepseek_v3", {}, {"connection": "residual"}),
    "nanochat": ("nanochat", {}, {"connection": "mhc"}),
}


@pytest.mark.parametrize("model_type, host, fields", CASES.values(), ids=CASES.keys())
def test_counts_are_those_of_the_stages(model_type, host, fields):
    config = random_model(model_type, host, **fields).config
    plans = plan_stages(config, split_layers(3, 3), loop_ranks(3, 1))
    count = count_parameters(config)
    for plan in plans:
        stage = stage_from_config(config, plan, seed=0, device="meta")
        assert count.stage(plan).num_parameters == sum(parameter.numel() for parameter in stage.parameters())
    assert count.rank(plans[:2]) == count.stage(plans[0]) + count.stage(plans[1])


def test_tensor_parallelism_splits_what_the_plan_names():
    model = random_model("llama", sublayers_per_block=3)
    whole, half = count_parameters(model.config), count_parameters(model.config, num_tensor=2)
    attention_and_mlp = sum(
        parameter.numel() for name, parameter in model.model.layers[0].named_parameters() if "_proj" in name
    )
    assert whole.layers[0].num_parameters - half.layers[0].num_parameters == attention_and_mlp // 2
    assert whole.every == half.every
    # The plan of older versions of transformers does not name the embeddings.
    num_devices = 2 if "model.embed_tokens" in model.tp_plan else 1
    assert half.first.num_parameters == -(-whole.first.num_parameters // num_devices)


def test_only_the_experts_of_a_token_have_outputs():
    dense, sparse = (random_model(host).config for host in ("qwen3", "qwen3_moe"))
    difference = count_parameters(sparse).layers[1].output_channels - count_parameters(dense).layers[1].output_channels
    host = sparse.text_config
    of_expert = 2 * host.moe_intermediate_size + host.hidden_size
    router = host.num_experts
    dense_mlp = 2 * host.intermediate_size + host.hidden_size
    assert difference == host.num_experts_per_tok * of_expert + router - dense_mlp
