"""The value residual: ResFormer's attention written out by hand, its start as the host, and what it works with."""

import copy
import math
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from moda_oracles import masks_of_all_kinds
from moda_slow_model import SlowModel
from model_checks import depth_model, randomise_depth, relative_max_error
from peft import get_peft_model
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config, tiny_stock_model
from torch import Tensor, nn

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, depth_param_groups, lora_config
from hf_depthattn.host_attention import REFUSED_VALUE_RESIDUAL
from hf_depthattn.integrations.layerwise import layers_that_pass_tensors
from hf_depthattn.integrations.trainer import muon_param_groups
from hf_depthattn.value_residual import ValueResidual

COMBINATIONS = {
    "residual": {"connection": "residual"},
    "AttnRes": {"sublayers_per_block": 2, "read_scale": "sum"},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp", "depth_gate": "head"},
    "MoDA, newest slot": {"sublayers_per_block": 1, "depth_kv": "attention", "num_depth_slots": 1},
}
every_combination = pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def value_model(model_type="llama", dtype=torch.float32, **fields) -> DepthAttnForCausalLM:
    """A model with random factors, queries and gates."""
    model = depth_model(
        tiny_stock_model(model_type, dtype), **{"connection": "residual", **fields}, value_residual=True
    )
    randomise_depth(model)
    with torch.no_grad():
        for module in mixes(model):
            module.first_scale.add_(0.3)
    model.generation_config.eos_token_id = None
    return model


def mixes(model: nn.Module) -> list[ValueResidual]:
    return [module for module in model.modules() if isinstance(module, ValueResidual)]


def attention_by_loops(x: list[Tensor], weights: list[dict[str, Tensor]], scales, num_heads, num_kv_heads, turns):
    """ResFormer's attention of several layers with inputs x_l [T, D], by loops over heads and positions.

    v_1 = W_1 x_1;  v_l = c1 v_1 + c2 W_l x_l;  o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(d)) v_s
    """
    first, outputs = None, []
    for number, (of_layer, weight) in enumerate(zip(x, weights, strict=True)):
        query, key, value = (of_layer @ weight[name].T for name in ("q_proj", "k_proj", "v_proj"))
        if number == 0:
            first = value
        else:
            value = scales[number - 1][0] * first + scales[number - 1][1] * value
        size = query.shape[1] // num_heads
        heads = []
        for head in range(num_heads):
            columns = slice(head * size, (head + 1) * size)
            group = head * num_kv_heads // num_heads
            shared = slice(group * size, (group + 1) * size)
            rows = []
            for t in range(len(of_layer)):
                scores = []
                for s in range(t + 1):
                    q, k = turns[t] @ query[t, columns], turns[s] @ key[s, shared]
                    scores.append(q @ k / math.sqrt(size))
                p = torch.stack(scores).softmax(0)
                rows.append(sum(p[s] * value[s, shared] for s in range(t + 1)))
            heads.append(torch.stack(rows))
        outputs.append(torch.cat(heads, 1) @ weight["o_proj"].T)
    return outputs


def turn(position: int, size: int, base: float) -> Tensor:
    """The rotation at a position as a matrix [d, d]."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for pair in range(size // 2):
        angle = position * base ** (-2 * pair / size)
        matrix[pair, pair] = matrix[pair + size // 2, pair + size // 2] = math.cos(angle)
        matrix[pair, pair + size // 2], matrix[pair + size // 2, pair] = -math.sin(angle), math.sin(angle)
    return matrix


def test_forward_and_every_gradient_equal_resformers_attention_by_loops():
    model = value_model(dtype=torch.float64)
    host, length = model.config.text_config, 5
    layers = model.model.layers
    seen: list[Tensor] = []
    given = [torch.randn(1, length, host.hidden_size, dtype=torch.float64, requires_grad=True) for _ in layers]
    for layer, x in zip(layers, given, strict=True):
        # The attention modules read chosen inputs, so that norms, which compute in float32, are not involved.
        layer.self_attn.register_forward_pre_hook(lambda module, args, kwargs, x=x: ((x,), kwargs), with_kwargs=True)
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: (cos, sin))
    turns = [turn(t, host.head_dim, host.rope_parameters["rope_theta"]) for t in range(length)]
    diagonal = torch.stack([t.diagonal() for t in turns])
    cos = diagonal[None]
    half = host.head_dim // 2
    lower = torch.stack([t[half:, :half].diagonal() for t in turns])
    sin = torch.cat([lower, lower], 1)[None]
    model(random_ids(1, length), use_cache=False)

    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = [{name: getattr(layer.self_attn, name).weight for name in names} for layer in layers]
    scales = [(module.first_scale, module.own_scale) for module in mixes(model)]
    expected = attention_by_loops(
        [x[0] for x in given], weights, scales, host.num_attention_heads, host.num_key_value_heads, turns
    )
    downstream = [torch.randn_like(output) for output in expected]
    inputs = [*given, *(w for weight in weights for w in weight.values()), *(s for pair in scales for s in pair)]
    assert len(inputs) == 3 + 12 + 4
    grads = []
    for outputs in ([output[0] for output in seen], expected):
        loss = sum((output * weight).sum() for output, weight in zip(outputs, downstream, strict=True))
        grads.append(torch.autograd.grad(loss, inputs))
    for actual, wanted in zip([output[0] for output in seen], expected, strict=True):
        assert relative_max_error(actual, wanted) <= 1e-12
    for actual, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 0 and relative_max_error(actual, wanted) <= 1e-12


@every_combination
def test_whole_models_equal_the_slow_model_with_every_gradient(fields):
    model = value_model(dtype=torch.float64, **fields)
    ids, positions = random_ids(2, 6), torch.arange(6).repeat(2, 1)
    slow = SlowModel(model)
    for weight in slow.weights.values():
        weight.requires_grad_()
    actual, expected = model(ids).logits, slow.logits(ids, positions, masks_of_all_kinds(2, 6)["causal"])
    # Norms of hosts compute in float32.
    assert relative_max_error(actual, expected) <= 3e-6
    downstream = torch.randn_like(expected)
    for logits in (actual, expected):
        (logits * downstream).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = slow.weights[name].grad
        if wanted is None or wanted.abs().max() == 0:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        else:
            assert relative_max_error(parameter.grad, wanted) <= 2e-5, name


@pytest.mark.parametrize("model_type", [name for name in ALL_HOSTS if name not in REFUSED_VALUE_RESIDUAL])
def test_every_other_host_starts_as_itself_and_uses_the_first_values(model_type):
    fields = {"attn_layer_period": 1, "attn_layer_offset": 0} if model_type == "jamba" else {}
    config = tiny_host_config(model_type, **fields)
    if "full_attention" in (getattr(config, "layer_types", None) or ()) and len(set(config.layer_types)) > 1:
        # At least two layers with softmax attention.
        kinds = list(config.layer_types)
        fields["layer_types"] = [*kinds[:2], "full_attention"]
        if kinds[0] not in ("full_attention", "sliding_attention", "minimax_m3_sparse"):
            fields["layer_types"] = [kinds[0], "full_attention", "full_attention"]
    stock, ids = tiny_stock_model(model_type, **fields), random_ids(2, 9)
    model = depth_model(stock, connection="residual", value_residual=True)
    with torch.no_grad():
        expected = stock(ids, use_cache=False).logits
        assert relative_max_error(model(ids, use_cache=False).logits, expected) <= 1e-5
        for module in mixes(model):
            module.first_scale.fill_(0.5)
        assert mixes(model) and relative_max_error(model(ids, use_cache=False).logits, expected) > 1e-4


@pytest.mark.parametrize("model_type", [name for name in ALL_HOSTS if name in REFUSED_VALUE_RESIDUAL])
def test_other_hosts_are_refused_by_name(model_type):
    host = tiny_host_config(model_type)
    with pytest.raises(StrictDataclassError, match=f"value_residual: True is not possible on '{model_type}'"):
        DepthAttnConfig(text_config=host, connection="residual", value_residual=True)


def test_hosts_with_one_attention_layer_are_refused():
    with pytest.raises(StrictDataclassError, match="at least two softmax attention layers, not 1"):
        DepthAttnConfig.residual(tiny_host_config("llama", num_hidden_layers=1), value_residual=True)


@pytest.mark.parametrize(("start", "scales"), [("host", (0.0, 1.0)), ("resformer", (0.5, 0.5))])
def test_factors_start_as_configured_and_stay_float32(start, scales, tmp_path):
    config = DepthAttnConfig.residual(tiny_host_config("llama"), value_residual=True, value_residual_init=start)
    model = DepthAttnForCausalLM(config)
    tiny_stock_model("llama").save_pretrained(tmp_path / "host")
    loaded = DepthAttnForCausalLM.from_pretrained(tmp_path / "host", config=config, dtype=torch.bfloat16)
    for each in (model, loaded, model.to(torch.bfloat16)):
        assert len(mixes(each)) == 2 and each.model.layers[0].value_residual is None
        for module in mixes(each):
            for parameter, scale in zip((module.first_scale, module.own_scale), scales, strict=True):
                assert parameter.dtype == torch.float32 and parameter.tolist() == [scale]


@every_combination
def test_cached_decoding_equals_the_full_forward(fields):
    model, ids = value_model(**fields), random_ids(2, 8)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = model(ids[:, :5]).past_key_values
        for t in range(5, 8):
            step = model(ids[:, t : t + 1], past_key_values=cache).logits
            assert relative_max_error(step[:, 0], expected[:, t]) <= 1e-5
    generated = [model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*generated)


@every_combination
def test_checkpointed_gradients_are_equal_to_the_bit(fields):
    model, ids = value_model(**fields).train(), random_ids(2, 7)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *grads))
    assert all(module.first_scale.grad.abs() > 0 for module in mixes(model))


def test_copies_and_saved_models_compute_the_same(tmp_path):
    model, ids = value_model(**COMBINATIONS["MoDA"]), random_ids(2, 7)
    model.save_pretrained(tmp_path / "saved")
    loaded = DepthAttnForCausalLM.from_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "value residual" in card and "2410.17897" in card and "value-residual" in card
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(other(ids).logits, model(ids).logits)


def test_lora_on_v_proj_is_within_the_mix():
    model, ids = value_model(), random_ids(2, 7)
    peft_model = get_peft_model(model, lora_config(model, target_modules=["v_proj"]))
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert sum("value_residual.modules_to_save" in name for name in trained) == 4
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        apart = peft_model(ids).logits
        merged = peft_model.merge_and_unload()
        assert relative_max_error(merged(ids).logits, apart) <= 1e-5


def test_optimizers_neither_decay_the_factors_nor_use_muon():
    model = value_model()
    factors = {id(p) for module in mixes(model) for p in module.parameters()}
    for groups in (depth_param_groups(model, lr=1.0, weight_decay=0.1), muon_param_groups(model, lr=1.0)):
        found = [group for group in groups if factors & {id(p) for p in group["params"]}]
        assert [(group["weight_decay"], group.get("use_muon", False)) for group in found] == [(0.0, False)]
        assert factors <= {id(p) for p in found[0]["params"]}


def test_compiled_models_compute_the_same():
    model, ids = value_model(**COMBINATIONS["MoDA, newest slot"]), random_ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_max_error(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) <= 1e-6


def test_layers_can_pass_tensors():
    model, ids = value_model(**COMBINATIONS["MoDA"]), random_ids(2, 7)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with layers_that_pass_tensors(model):
            assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_an_attention_that_does_not_call_v_proj_is_an_error():
    model = value_model()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda x, **kwargs: (x, None)
    with pytest.raises(RuntimeError, match="value_residual: LlamaAttention has not called its v_proj"):
        model(random_ids(1, 4))
    assert attention.v_proj.value_exchange is None


def test_factors_without_the_switch_have_no_effect_and_warn(caplog):
    with caplog.at_level("WARNING", logger="hf_depthattn"):
        DepthAttnConfig.residual(tiny_host_config("llama"), value_residual_init="resformer")
    assert "value_residual_init has no effect with value_residual=False" in caplog.text
