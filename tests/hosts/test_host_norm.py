"""The epsilon of a host's norms, against the norms of the built host."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_hosts import ALL_HOSTS, tiny_host_config
from torch import nn
from transformers import AutoModelForCausalLM

from hf_depthattn import DepthAttnConfig, DepthAttnModel, host_norm
from hf_depthattn.host_layouts import host_layout
from hf_depthattn.host_norm import _EPS_FIELDS, host_norm_eps

EPS = 3e-4


def eps_of(norm: nn.Module) -> float:
    """The epsilon of a built norm, whose attribute differs between hosts."""
    for owner in (norm, *norm.children()):
        for name in ("eps", "variance_epsilon"):
            if hasattr(owner, name):
                return getattr(owner, name)
    # OLMo's norm has the number in its forward: for inputs of variance v it divides by sqrt(v + eps).
    x = torch.tensor([[1e-3, -1e-3]], dtype=torch.float64).repeat(1, 16)
    return ((1e-3 / norm(x)[0, 0].item()) ** 2) - 1e-6


def has_norm(layer: nn.Module, name: str) -> bool:
    """Whether a layer has this norm: recurrent layers have other names, ModernBERT's first layer has none."""
    return not isinstance(getattr(layer, name, nn.Identity()), nn.Identity)


@pytest.mark.parametrize("model_type", ALL_HOSTS)
def test_eps_is_that_of_the_built_norms(model_type):
    config = tiny_host_config(model_type)
    for field in _EPS_FIELDS:
        if hasattr(config, field):
            setattr(config, field, EPS)
    with torch.device("meta" if model_type != "olmo" else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    layout = host_layout(model_type)
    names = [part.pre_norm or part.post_norm for part in (layout.attention, layout.mlp)]
    layers = model.base_model.layers
    found = {eps_of(getattr(layer, name)) for layer in layers for name in names if has_norm(layer, name)}
    (eps,) = found
    assert host_norm_eps(config) == pytest.approx(eps, rel=1e-6)
    assert DepthAttnConfig.attn_res(config).resolved_depth_norm_eps == host_norm_eps(config)


def test_a_host_without_eps_is_named(monkeypatch):
    config = tiny_host_config("llama")
    monkeypatch.setattr(host_norm, "_EPS_FIELDS", ("rms_eps", "layer_eps"))
    with pytest.raises(StrictDataclassError, match=r"depth_norm_eps: None .*'llama' has none of .*rms_eps, layer_eps"):
        DepthAttnConfig.attn_res(config)
    # An explicit number needs no field, and other connections need no number.
    assert DepthAttnConfig.attn_res(config, depth_norm_eps=1e-3).resolved_depth_norm_eps == 1e-3
    assert DepthAttnConfig.residual(config).depth_norm_eps is None


def test_reads_use_the_eps_of_the_host_or_an_explicit_one():
    for given, expected in ((None, EPS), (1e-2, 1e-2)):
        config = DepthAttnConfig.attn_res(tiny_host_config("llama", rms_norm_eps=EPS), depth_norm_eps=given)
        with torch.device("meta"):
            model = DepthAttnModel(config)
        assert {layer.mlp_depth.eps for layer in model.layers} == {expected}


def qwen3_with(overrides) -> DepthAttnModel:
    return DepthAttnModel(DepthAttnConfig.attn_res(tiny_host_config("qwen3"), norm_eps_overrides=overrides))


def test_norms_that_are_named_have_another_eps_than_the_config_also_after_saving(tmp_path):
    overrides = {"layers.0.input_layernorm": 1e-2, "q_norm": 2e-2, "norm": 3e-2}
    built = qwen3_with(overrides)
    built.save_pretrained(tmp_path)
    for model in (built, DepthAttnModel.from_pretrained(tmp_path)):
        for name, norm in model.named_modules():
            if hasattr(norm, "variance_epsilon"):
                named = next((eps for ending, eps in overrides.items() if f".{name}".endswith(f".{ending}")), None)
                assert norm.variance_epsilon == (named or model.config.rms_norm_eps), name
    assert built.layers[0].input_layernorm.variance_epsilon == 1e-2 and built.norm.variance_epsilon == 3e-2
    assert [layer.self_attn.q_norm.variance_epsilon for layer in built.layers] == [2e-2] * 3


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"layers.3.input_layernorm": 1e-5}, "no module 'layers.3.input_layernorm'"),
        ({"mlp": 1e-5}, "'mlp' is a Qwen3MLP"),
        ({"norm": 0.0}, "0.0 for 'norm' must be greater than 0"),
        ({"norm": "1e-5"}, "norm_eps_overrides"),
    ],
)
def test_eps_of_what_is_no_norm_is_an_error(overrides, said):
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        qwen3_with(overrides)
