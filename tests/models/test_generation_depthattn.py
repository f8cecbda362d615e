"""Options of `generate` that run other models or a part of the layers: they work, or are refused early."""

import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model
from transformers import GenerationConfig

COMBINATIONS = {
    "AttnRes": {"num_blocks": 2},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp", "depth_gate": "head"},
    "both": {"num_blocks": 2, "depth_kv": "attention+mlp"},
    "residual": {"connection": "residual"},
}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def model_and_ids(combination: str):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama"), **COMBINATIONS[combination])
    randomise_depth(model)
    return model, random_ids(1, 9)


@pytest.mark.parametrize("where", ["argument", "generation config", "the model's generation config"])
@pytest.mark.parametrize("option", [{"assistant_early_exit": 2}, {"use_mtp": True}], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_drafting_with_own_layers_is_refused_and_leaves_the_model_intact(combination, option, where):
    model, ids = model_and_ids(combination)
    expected = model.generate(ids, **GREEDY)
    config_before = model.config.to_dict()
    arguments = dict(GREEDY)
    if where == "argument":
        arguments.update(option)
    elif where == "generation config":
        arguments = {"generation_config": GenerationConfig(**GREEDY, **option)}
    else:
        model.generation_config.update(**option)
    name = next(iter(option))
    with pytest.raises(ValueError, match=rf"{name}: .*`assistant_model` or `prompt_lookup_num_tokens`"):
        model.generate(ids, **arguments)
    model.generation_config.update(**dict.fromkeys(option))
    assert model.config.to_dict() == config_before
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize("assistant", ["stock", "depth"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_an_assistant_model_changes_no_token(combination, assistant):
    model, ids = model_and_ids(combination)
    other = tiny_stock_model("llama") if assistant == "stock" else model_and_ids("both")[0]
    assert torch.equal(model.generate(ids, assistant_model=other, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_prompt_lookup_changes_no_token(combination):
    model, ids = model_and_ids(combination)
    ids = torch.cat([ids, ids[:, :5]], -1)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_cache_changes_no_token(combination, options):
    model, ids = model_and_ids(combination)
    assert torch.equal(model.generate(ids, **options, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_model_cut_short_says_what_is_wrong(combination):
    """Tools that skip layers run the head on what the last layer has not read."""
    model, ids = model_and_ids(combination)
    model.config.text_config.num_hidden_layers = 2
    with pytest.raises(AttributeError, match=r"DepthState.*last decoder layer"):
        model(ids)
    model.config.text_config.num_hidden_layers = 3
    model.model.layers = model.model.layers[:2]
    with pytest.raises(AttributeError, match=r"DepthState.*last decoder layer"):
        model(ids)
