"""DeepNorm: the equation on whole models, the initial weights on every host that has them, and refused hosts."""

import pytest
import torch
from connection_cases import random_case
from huggingface_hub.errors import StrictDataclassError
from model_checks import relative_max_error
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.deepnorm_projections import (
    ATTENTION_PROJECTIONS,
    MLP_PROJECTIONS,
    scaled_weights,
    why_not_scaled,
)
from hf_depthattn.host_layouts import host_layout, post_norm_layout

NUM_LAYERS = 3
DEEPNORM = {"connection": "deepnorm", "norm_position": "post"}

# Matrices in sublayers that are not scaled, by a part of their name: queries, keys, what chooses experts or keys, and
# gates of attention outputs, stacked biases of experts. The rest are of one row: gates of experts.
KEPT = {"q_proj", "k_proj", "gate", "router", "wg", "indexer", "g_proj", "gate_up_proj_bias", "down_proj_bias"}


def possible(model_type: str) -> bool:
    return (
        post_norm_layout(host_layout(model_type)) is not None and why_not_scaled(tiny_host_config(model_type)) is None
    )


POSSIBLE = [model_type for model_type in ALL_HOSTS if possible(model_type)]


def slow_logits(model, ids):
    """Llama with DeepNorm, one sequence at a time, attention as a loop over heads."""
    config, rows = model.config.text_config, []
    scale = (2 * NUM_LAYERS) ** 0.25
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def normed(norm, x):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    for sequence in ids:
        x = model.model.embed_tokens.weight[sequence]
        length = len(sequence)
        cos, sin = model.model.rotary_emb(x[None], torch.arange(length)[None])
        for layer in model.model.layers:
            attention = layer.self_attn
            q = (x @ attention.q_proj.weight.T).view(length, heads, size).transpose(0, 1)
            k = (x @ attention.k_proj.weight.T).view(length, kv_heads, size).transpose(0, 1)
            v = (x @ attention.v_proj.weight.T).view(length, kv_heads, size).transpose(0, 1)
            q, k = (each[0] for each in apply_rotary_pos_emb(q[None], k[None], cos, sin))
            outputs = []
            for head in range(heads):
                group = head * kv_heads // heads
                scores = (q[head] @ k[group].T) / size**0.5
                future = torch.ones(length, length, dtype=torch.bool).triu(1)
                outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[group])
            y = torch.cat(outputs, -1) @ attention.o_proj.weight.T
            x = normed(layer.input_layernorm, scale * x + y)
            gate, up = x @ layer.mlp.gate_proj.weight.T, x @ layer.mlp.up_proj.weight.T
            y = (gate / (1 + (-gate).exp()) * up) @ layer.mlp.down_proj.weight.T
            x = normed(layer.post_attention_layernorm, scale * x + y)
        rows.append(normed(model.model.norm, x) @ model.lm_head.weight.T)
    return torch.stack(rows)


def test_logits_and_every_gradient_equal_the_equation():
    model, ids = random_case("deepnorm").double(), random_ids(2, 7)
    actual, expected = model(ids, use_cache=False).logits, slow_logits(model, ids)
    # transformers' rotary embeddings are in float32.
    assert relative_max_error(actual, expected) < 1e-6
    parameters = list(model.parameters())
    cotangent = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, parameters, cotangent)
    for found, gradient in zip(gradients, torch.autograd.grad(expected, parameters, cotangent), strict=True):
        assert relative_max_error(found, gradient) < 1e-5


def modules_of(layer):
    """Yield the modules of both sublayers with the names of their projections."""
    yield getattr(layer, layer.attention_name), ATTENTION_PROJECTIONS
    for name in (layer.layout.mlp.module, layer.layout.mlp.companion):
        if name is not None and getattr(layer, name) is not None:
            yield getattr(layer, name), MLP_PROJECTIONS


def fresh(make, config):
    torch.manual_seed(0)
    return make(config)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "granitemoeshared", "starcoder2", "gpt_oss"])
def test_initial_weights_are_those_of_the_host_times_the_gain(model_type):
    host = fresh(AutoModelForCausalLM.from_config, tiny_host_config(model_type))
    config = DepthAttnConfig(text_config=tiny_host_config(model_type), **DEEPNORM)
    model = fresh(DepthAttnForCausalLM, config)
    layers = model.base_model.layers
    scaled = {
        id(weight)
        for layer in layers
        for module, names in modules_of(layer)
        for weight in scaled_weights(module, names)
    }
    gain = (8 * NUM_LAYERS) ** -0.25
    stock = dict(host.named_parameters())
    for name, parameter in model.named_parameters():
        expected = stock[name] * gain if id(parameter) in scaled else stock[name]
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0, msg=name)
    leaves = {
        name.removesuffix(".weight").rpartition(".")[2] for name, p in model.named_parameters() if id(p) in scaled
    }
    if model_type == "llama":
        assert leaves == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("model_type", POSSIBLE)
def test_every_matrix_of_a_possible_host_is_scaled_or_known_not_to_be(model_type):
    with torch.device("meta"):
        model = DepthAttnForCausalLM(DepthAttnConfig(text_config=tiny_host_config(model_type), **DEEPNORM))
    for layer in model.base_model.layers:
        attention = getattr(layer, layer.attention_name)
        names = {name.split(".")[-2] for name, p in attention.named_parameters() if p.ndim >= 2}
        assert len(names & ATTENTION_PROJECTIONS) == 2, "values and outputs"
        for module, projections in modules_of(layer):
            scaled = {id(weight) for weight in scaled_weights(module, projections)}
            assert scaled
            for name, parameter in module.named_parameters():
                if parameter.ndim >= 2 and id(parameter) not in scaled and parameter.shape[0] > 1:
                    assert not KEPT.isdisjoint(name.split(".")), name


def test_weights_of_a_checkpoint_are_not_scaled(tmp_path):
    LlamaForCausalLM(tiny_host_config("llama")).save_pretrained(tmp_path / "stock")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "stock")
    config = DepthAttnConfig(text_config=stock.config, **DEEPNORM)
    model = DepthAttnForCausalLM.from_pretrained(tmp_path / "stock", config=config)
    for name, parameter in stock.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "model_type, named",
    [
        ("deepseek_v3", "keys and values of its attention come from one latent projection"),
        ("phi3", "its attention has one projection for values and keys"),
        ("persimmon", "its attention has one projection for values and keys"),
        ("qwen3_next", "some of its layers have no softmax attention"),
        ("jamba", "some of its layers have no softmax attention"),
    ],
)
def test_hosts_without_separate_values_are_refused_by_name(model_type, named):
    with pytest.raises(StrictDataclassError, match=f"'deepnorm' is not possible on '{model_type}': .*{named}"):
        DepthAttnConfig(text_config=tiny_host_config(model_type), **DEEPNORM)


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2"])
def test_hosts_with_norms_after_sublayers_are_refused_by_name(model_type):
    with pytest.raises(StrictDataclassError, match=f"'post' needs a pre-norm host, but '{model_type}'"):
        DepthAttnConfig(text_config=tiny_host_config(model_type), **DEEPNORM)


def test_norms_of_the_host_are_refused():
    with pytest.raises(StrictDataclassError, match=r"'host' is not possible with connection='deepnorm'.*'post'"):
        DepthAttnConfig(text_config=tiny_host_config("llama"), connection="deepnorm")
