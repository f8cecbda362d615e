"""Stages one after the other compute what the whole model does, with the same parameters, on every host."""

import pytest
import torch
from connection_cases import CASES, FIELDS, random_case
from depth_forms import random_model
from pipeline_stages import gradient_errors, run, stages_of, summed_gradients
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.stage_building import routers_of
from hf_depthattn.host_attention import REFUSED_DEPTH_KV

#: Hosts with something of their own: soft-capping, two kinds of rotary embeddings, other names of norms and
#: embeddings, a norm without parameters that also follows the embeddings, linear attention, a router loss.
SPREAD = ("llama", "gemma2", "gemma3_text", "jamba", "lfm2", "modernbert-decoder", "nanochat", "qwen3_moe")
TOLERANCE = 1e-12


def float64_model(host: str, **fields):
    has_routers = hasattr(tiny_host_config(host), "output_router_logits") and host != "jetmoe"
    torch.manual_seed(0)
    model = random_model(host, {"output_router_logits": True} if has_routers else {}, **fields)
    # The grouped matrix product of MoE hosts does not support float64.
    model.set_experts_implementation("eager")
    return model.double().train()


def check_stages(model, num_stages: int = 3, **kwargs) -> None:
    """Loss, every gradient and the names of all parameters, with as many stages as layers."""
    ids = random_ids(2, 11)
    torch.manual_seed(1)
    expected = model(ids, labels=ids, use_cache=False, **kwargs).loss
    expected.backward()
    stages = stages_of(model, num_stages)
    torch.manual_seed(1)
    loss = run(stages, ids, labels=ids, **kwargs)
    loss.backward()
    assert ((loss - expected).abs() / expected).item() <= TOLERANCE
    errors = gradient_errors(stages, model)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize(
    "host", [host if host in SPREAD else pytest.param(host, marks=pytest.mark.slow) for host in ALL_HOSTS]
)
def test_stages_equal_the_whole_model_on_every_host(host):
    fields = {"sublayers_per_block": 3, "read_scale": "sum"}
    if host not in REFUSED_DEPTH_KV:
        fields |= {"depth_kv": "attention+mlp", "depth_gate": "head"}
    check_stages(float64_model(host, **fields))


@pytest.mark.parametrize(
    "case", [case if case in FIELDS else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_stages_equal_the_whole_model_with_every_connection(case):
    check_stages(random_case(case).double().train())


@pytest.mark.parametrize(
    "fields",
    [
        {"sublayers_per_block": 1, "depth_window": 1},
        {"sublayers_per_block": 2, "static_mix": True},
        {"sublayers_per_block": 3, "query": "input"},
        {"connection": "residual", "depth_kv": "attention+mlp", "depth_slots": [[], [1], [0, 3]]},
        {"connection": "residual", "depth_kv": "attention", "num_depth_slots": 1, "depth_key_norm": "reader"},
    ],
    ids=["window", "static_mix", "input", "explicit slots", "one slot"],
)
def test_stages_equal_the_whole_model_with_every_option(fields):
    check_stages(float64_model("qwen3", **fields))


def test_padding_and_positions_reach_every_stage():
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    check_stages(float64_model("llama", sublayers_per_block=1), attention_mask=mask, position_ids=positions)


def test_a_stage_has_its_own_parameters_and_those_that_it_shares():
    first, middle, last = stages_of(random_model("gemma2", sublayers_per_block=1), 3)
    names = [{name for name, _ in stage.named_parameters()} for stage in (first, middle, last)]
    assert {name for name in names[1] if ".layers." not in name} == {
        "model.depth_reads.query",
        "model.depth_reads.key_norm",
    }
    assert all(".layers.1." in name for name in names[1] if ".layers." in name)
    # Gemma 2 ties its embeddings.
    assert names[0] & names[2] == {
        "model.embed_tokens.weight",
        "model.depth_reads.query",
        "model.depth_reads.key_norm",
    }
    assert "model.norm.weight" in names[2] - names[0]


def test_the_sum_of_shared_gradients_has_a_part_from_every_stage():
    model = float64_model("llama", sublayers_per_block=1)
    ids = random_ids(2, 7)
    stages = stages_of(model, 3)
    run(stages, ids, labels=ids).backward()
    for stage in stages:
        assert stage.model.depth_reads.query.grad.any()
    assert summed_gradients(stages)["model.depth_reads.query"][1:].any(dim=-1).all()


@pytest.mark.parametrize(
    "argument", ["output_depth_attentions", "output_hidden_states", "output_attentions", "use_cache"]
)
def test_outputs_that_no_stage_has_as_a_whole_are_refused(argument):
    first, *_ = stages_of(random_model("llama", sublayers_per_block=1), 3)
    with pytest.raises(ValueError, match=f"{argument}: True is not possible in a pipeline stage"):
        first(random_ids(2, 5), **{argument: True})


def test_embeddings_as_an_argument_are_refused():
    first, *_ = stages_of(random_model("llama", sublayers_per_block=1), 3)
    with pytest.raises(ValueError, match="inputs_embeds: a Tensor is not possible in a pipeline stage"):
        first(random_ids(2, 5), inputs_embeds=torch.ones(2, 5, 32))


def test_router_logits_that_were_not_planned_are_refused():
    first, *_ = stages_of(random_model("qwen3_moe", sublayers_per_block=1), 3)
    with pytest.raises(ValueError, match="output_router_logits: True differs from the config's False"):
        first(random_ids(2, 5), output_router_logits=True)


def test_a_host_with_several_routers_per_layer_is_refused_with_the_router_loss():
    config = DepthAttnConfig(text_config=tiny_host_config("jetmoe", output_router_logits=True))
    with pytest.raises(ValueError, match=r"output_router_logits: True is not possible in pipeline stages on 'jetmoe'"):
        routers_of(config)
