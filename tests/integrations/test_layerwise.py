"""Tools that run decoder layers one by one, as GPTQ and AutoRound do: with tensors it works, without it says how."""

import pytest
import torch
from connection_cases import CASES
from model_checks import depth_model, randomise_depth, relative_max_error
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn

from hf_depthattn import lora_config
from hf_depthattn.integrations.layerwise import layers_that_pass_tensors

COMBINATIONS = {
    "Full AttnRes": {"sublayers_per_block": 1},
    "Block AttnRes": {"num_blocks": 2},
    "windowed AttnRes": {"sublayers_per_block": 1, "depth_window": 2},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "MoDA, newest slots": {"connection": "residual", "depth_kv": "attention+mlp", "num_depth_slots": 3},
    "both": {"sublayers_per_block": 1, "depth_kv": "attention", "depth_gate": "head"},
    "residual": {"connection": "residual"},
}


class Caught(Exception):
    """Ends a forward pass at the first layer."""


def walk(model: nn.Module, ids: torch.Tensor, by_keyword: bool = False) -> torch.Tensor:
    """What layerwise quantisers do, followed by the final norm and the head."""
    caught = {}

    def catch(layer, args, kwargs):
        kwargs = dict(kwargs)
        caught["input"] = args[0] if args else kwargs.pop("hidden_states")
        caught["kwargs"] = kwargs
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(Caught), torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    hidden = caught["input"]
    for layer in model.model.layers:
        output = layer(hidden_states=hidden, **caught["kwargs"]) if by_keyword else layer(hidden, **caught["kwargs"])
        hidden = output[0] if isinstance(output, tuple) else output
    return model.lm_head(model.model.norm(hidden))


@pytest.fixture
def model_in_float64() -> nn.Module:
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama", torch.float64), **COMBINATIONS["both"])
    randomise_depth(model)
    return model


@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("host", ["llama", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_layers_run_one_by_one_give_the_models_logits(combination, host, by_keyword):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model(host, torch.float64), **COMBINATIONS[combination])
    randomise_depth(model)
    ids = random_ids(2, 7)
    expected = model(ids).logits
    with torch.no_grad(), layers_that_pass_tensors(model):
        assert relative_max_error(walk(model, ids, by_keyword), expected) < 1e-7
        assert relative_max_error(model(ids).logits, expected) < 1e-7
    assert torch.equal(model(ids).logits, expected)


def test_reads_of_a_walk_have_the_parameters_of_the_moment(model_in_float64):
    """A tool keeps the arguments that it captured at the first layer while it trains what later layers use."""
    model, ids = model_in_float64, random_ids(2, 7)

    def train_reads(layer, args, kwargs):
        with torch.no_grad():
            model.model.depth_reads.query[2:] *= -2

    handle = model.model.layers[1].register_forward_pre_hook(train_reads, with_kwargs=True)
    with torch.no_grad(), layers_that_pass_tensors(model):
        found = walk(model, ids)
    handle.remove()
    assert relative_max_error(found, model(ids).logits) < 1e-7


def test_a_walk_trains_the_reads(model_in_float64):
    """Although the arguments captured at the first layer have no graph."""
    model, ids = model_in_float64, random_ids(2, 7)
    parameters = list(model.model.depth_reads.parameters())
    expected = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    with layers_that_pass_tensors(model):
        found = torch.autograd.grad(walk(model, ids).square().sum(), parameters)
    for actual, gradient in zip(found, expected, strict=True):
        assert relative_max_error(actual, gradient) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_layers_with_every_connection_run_one_by_one(case):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama", torch.float64), **CASES[case])
    randomise_depth(model)
    ids = random_ids(2, 7)
    expected = model(ids).logits
    with torch.no_grad(), layers_that_pass_tensors(model):
        assert relative_max_error(walk(model, ids), expected) < 1e-7


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_without_it_the_error_names_it(combination):
    model = depth_model(tiny_stock_model("llama"), **COMBINATIONS[combination])
    with pytest.raises(RuntimeError, match=r"Layer 1 got a (tuple|Tensor).*layers_that_pass_tensors"):
        walk(model, random_ids(1, 5))


def test_a_quantiser_sees_every_linear_layers_input():
    """The inputs that hooks collect are those of the whole model, on every layer."""
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama"), **COMBINATIONS["both"])
    randomise_depth(model)
    ids = random_ids(2, 7)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        model(ids)
        with layers_that_pass_tensors(model):
            walk(model, ids)
    assert len(seen) == 7 * 3
    for name, (of_model, of_walk) in seen.items():
        assert relative_max_error(of_walk, of_model) < 1e-6, name


def test_tensors_that_no_layer_returned_are_refused(model_in_float64):
    layers, ids = model_in_float64.model.layers, random_ids(2, 7)
    with torch.no_grad(), layers_that_pass_tensors(model_in_float64):
        with pytest.raises(ValueError, match=r"layer 1 got a tensor, but layer 0 has not run"):
            layers[1](torch.zeros(2, 7, 32, dtype=torch.float64))
        walk(model_in_float64, ids)
        with pytest.raises(ValueError, match=r"\(2, 7, 31\) is not the shape of the output of layer 0"):
            layers[1](torch.zeros(2, 7, 31, dtype=torch.float64))


def test_a_model_without_depth_attention_is_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layers with depth attention"):
        layers_that_pass_tensors(tiny_stock_model("llama")).__enter__()


def test_layers_of_a_peft_model_use_the_trained_queries():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama", torch.float64), sublayers_per_block=1)
    wrapped = peft.get_peft_model(model, lora_config(model, r=2)).eval()
    randomise_depth(wrapped)
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = wrapped(ids, use_cache=False).logits
        with layers_that_pass_tensors(wrapped):
            actual = walk(wrapped.base_model.model, ids)
    assert relative_max_error(actual, expected) < 1e-7
    with torch.no_grad(), wrapped.disable_adapter():
        assert relative_max_error(wrapped(ids, use_cache=False).logits, expected) > 1e-3
