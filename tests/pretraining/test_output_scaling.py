"""Smaller output projections: which ones on every host, that outputs shrink exactly, the study's Llama bit for bit."""

import copy

import pytest
import torch
from connection_cases import CASES
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config, tiny_stock_model
from torch import nn
from transformers import LlamaConfig

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.runs import Setting
from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.errors import UserError
from hf_depthattn.host_layouts import host_layout
from hf_depthattn.pretraining.output_scaling import scale_outputs

# The names of output projections in the modelling files of all hosts, as read there.
NAMES = {
    *("Wo", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "o_proj", "out_proj", "output_linear", "w2"),
}
#: Hosts with a norm in front of the sum, inside of a module or as a part of the layer.
NORMALISED = [
    name
    for name in ALL_HOSTS
    if name == "axk1" or any((host_layout(name).attention.post_norm, host_layout(name).mlp.post_norm))
]


def model_of(model_type: str = "llama", **fields) -> DepthAttnForCausalLM:
    fields = {"connection": "residual", **fields}
    return DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config(model_type), **fields))


def outputs_by_name(model: DepthAttnForCausalLM) -> list[str]:
    sublayers = {id(module) for layer in model.base_model.layers for module in modules_of(layer)}
    inside = tuple(f"{name}." for name, module in model.named_modules() if id(module) in sublayers)
    return [
        name
        for name, _ in model.named_parameters()
        if name.startswith(inside) and name.removesuffix(".weight").rpartition(".")[2] in NAMES
    ]


def modules_of(layer: nn.Module) -> list[nn.Module]:
    return [*layer.attention_modules, *layer.mlp_modules]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def recorded_calls(model: nn.Module) -> list[tuple]:
    """The modules of all sublayers with their arguments and outputs in one forward pass."""
    calls, hooks = [], []

    def record(module, args, kwargs, output):
        calls.append((module, args, kwargs, output[0] if isinstance(output, tuple) else output))

    for layer in model.base_model.layers:
        for module in modules_of(layer):
            hooks.append(module.register_forward_hook(record, with_kwargs=True))
    with torch.no_grad():
        model.eval()(random_ids(2, 9), use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("model_type", [name for name in ALL_HOSTS if name not in NORMALISED])
def test_every_host_gets_its_output_projections_scaled_and_nothing_else(model_type):
    model = model_of(model_type)
    calls, before = recorded_calls(model), values(model)
    scaled = scale_outputs(model, 0.5)
    assert scaled == outputs_by_name(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, 0.5 * before[name] if name in scaled else before[name]), name
    # Biases start at zero, and half is exact.
    for module, args, kwargs, output in calls:
        with torch.no_grad():
            half = module(*args, **kwargs)
        assert output.any() and torch.equal(half[0] if isinstance(half, tuple) else half, 0.5 * output)


@pytest.mark.parametrize("model_type", ["gpt_oss", "starcoder2"])
def test_biases_stay(model_type):
    model = model_of(model_type)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).normal_()
    before = values(model)
    scaled = scale_outputs(model)
    assert scaled == outputs_by_name(model)
    assert any(before[name].ndim == 2 for name in biases) == (model_type == "gpt_oss")
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in biases)


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.has_scaled_outputs])
def test_the_llama_of_the_study_is_scaled_bit_for_bit_as_by_the_names_of_its_projections(arm):
    setting, num_layers = Setting(), 5
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "initializer_range")
    host = LlamaConfig(
        vocab_size=256, num_hidden_layers=num_layers, **{name: getattr(setting, name) for name in sizes}
    )
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=host, **ARMS[arm].fields))
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * num_layers) ** -0.5)
    assert len(scale_outputs(model)) == 2 * num_layers
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("case", CASES)
def test_the_connection_does_not_matter(case):
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config("llama"), **CASES[case]))
    assert scale_outputs(model) == outputs_by_name(model)


def test_a_parameter_that_layers_share_is_scaled_once():
    model = model_of()
    first, second = model.model.layers[:2]
    second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    before = values(model)
    scaled = scale_outputs(model, 0.25)
    assert "model.layers.0.self_attn.o_proj.weight" in scaled and len(scaled) == 5
    assert torch.equal(second.self_attn.o_proj.weight, 0.25 * before["model.layers.0.self_attn.o_proj.weight"])


def test_nothing_else_changes():
    model = model_of("qwen2_moe").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    scale_outputs(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", NORMALISED)
def test_hosts_that_normalise_outputs_are_refused(model_type):
    model = model_of(model_type)
    before = values(model)
    with pytest.raises(UserError, match="normalises"):
        scale_outputs(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_other_models_and_factors_are_refused_by_name():
    with pytest.raises(UserError, match="LlamaForCausalLM has no depth connections"):
        scale_outputs(tiny_stock_model("llama"))
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"factor: {factor} must be greater than 0 and finite"):
            scale_outputs(model_of(), factor)
    frozen = model_of()
    frozen.model.layers[2].mlp.requires_grad_(False)
    with pytest.raises(UserError, match="LlamaMLP of layer 2 has no trainable output projection"):
        scale_outputs(frozen)
    with torch.device("meta"):
        empty = model_of()
    with pytest.raises(UserError, match="sharded or on the meta device"):
        scale_outputs(empty)
