"""MoDA on every host: a closed gate is the host, rotations cancel, decoding with a cache equals decoding without."""

import pytest
import torch
from model_checks import depth_model, is_depth_key, randomise_depth, relative_max_error
from tiny_hosts import ALL_HOSTS, NUM_LAYERS, random_ids, tiny_host_config, tiny_stock_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from variants import in_turn

from hf_depthattn import DepthAttnConfig
from hf_depthattn.host_attention import REFUSED_DEPTH_KV, depth_kv_shape

HOSTS = [name for name in ALL_HOSTS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in REFUSED_DEPTH_KV]

#: Hosts whose tiny config has layers of one kind only, with both kinds.
MIXED_LAYERS = {
    "afmoe": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone_moe": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "flint": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "kolibri1": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "laguna": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [4, 2, 6],
    },
    "mellum": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2": {
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def stock_host(model_type, dtype=torch.float32):
    return tiny_stock_model(model_type, dtype, **MIXED_LAYERS.get(model_type, {}))


def moda_model(model_type, dtype=torch.float32, **fields):
    fields = {"connection": "residual", "depth_kv": "attention+mlp", **fields}
    model = depth_model(stock_host(model_type, dtype), **fields)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(("model_type", "connection"), in_turn(HOSTS, ["residual", "attn_res"]))
def test_closed_gate_equals_host(model_type, connection):
    ids = random_ids(2, 11)
    fields = {"connection": connection, "depth_kv": "attention+mlp", "depth_gate": "head", "read_scale": "sum"}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        stock = stock_host(model_type, dtype)
        if dtype == torch.float64 and stock.config._attn_implementation == "eager":
            tolerance = 1e-6  # eager attention of hosts rounds its weights to float32
        model = depth_model(stock, **fields)
        with torch.no_grad():
            assert relative_max_error(model(ids).logits, stock(ids).logits) <= tolerance


def changes_with_position(model, ids) -> float:
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    with torch.no_grad():
        logits = [model(ids, position_ids=positions + shift).logits for shift in (0, 7)]
    return relative_max_error(*logits)


@pytest.mark.parametrize(("model_type", "norm"), in_turn(HOSTS, ["writer", "reader"]))
def test_rotations_of_depth_keys_cancel_where_those_of_the_host_do(model_type, norm):
    torch.manual_seed(0)
    ids = random_ids(2, 11)
    if changes_with_position(stock_host(model_type), ids) > 1e-5:
        assert "hunyuan" in model_type, "normalising after rotating is the one known reason"
        pytest.skip("the host itself depends on absolute positions")
    if norm == "reader" and model_type in ("nanochat", "persimmon"):
        pytest.skip("refused: it normalises keys after rotating them, or has no projection of keys alone")
    assert changes_with_position(moda_model(model_type, depth_key_norm=norm), ids) <= 1e-5


@pytest.mark.parametrize(
    "model_type", ["llama", "smollm3", "gemma3_text", "deepseek_v2", "deepseek_v3", "glm", "gpt_oss"]
)
def test_unrotated_depth_keys_depend_on_absolute_positions(model_type):
    """The official recipe, and the proof that the test above can fail."""
    model = moda_model(model_type, depth_key_rope="none")
    assert changes_with_position(model, random_ids(2, 11)) > 1e-3


@pytest.mark.parametrize("model_type", HOSTS)
def test_cached_greedy_generation_equals_uncached(model_type):
    model = moda_model(model_type, connection="attn_res", num_blocks=3, read_scale="sum", depth_gate="head")
    randomise_depth(model)
    ids = random_ids(2, 9)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **arguments)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **arguments))


@pytest.mark.parametrize("model_type", HOSTS)
def test_every_depth_parameter_gets_a_gradient(model_type):
    model = moda_model(model_type, depth_gate="head").train()
    randomise_depth(model)
    ids = random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    depth_gradients = {name: p.grad for name, p in model.named_parameters() if is_depth_key(name)}
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * NUM_LAYERS
    with_attention = [i for i, kind in enumerate(kinds) if kind.endswith("_attention") and kind != "linear_attention"]
    num_readers = sum(i > 0 for i in with_attention)
    # Two projections for each MLP in front of the last layer that reads.
    num_writers = with_attention[-1]
    assert len(depth_gradients) == num_readers + 2 * num_writers
    for name, gradient in depth_gradients.items():
        assert gradient is not None and gradient.any(), name


@pytest.mark.parametrize("model_type", HOSTS)
def test_slots_have_the_announced_shape(model_type):
    model = moda_model(model_type)
    shape = depth_kv_shape(model.config.text_config)
    states = []
    # Slots are dropped after their last reader: in some hosts, only one layer of three writes or reads them.
    for layer in model.model.layers[:-1]:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(random_ids(2, 5))
    keys = [key for state in states for key in state.depth_keys]
    assert keys, "slots travel in the state"
    for key, value in zip(keys, [value for state in states for value in state.depth_values], strict=True):
        assert key.shape == (2, shape.num_kv_heads, 5, shape.key_dim)
        assert value.shape == (2, shape.num_kv_heads, 5, shape.value_dim)


@pytest.mark.parametrize("model_type", [name for name in ALL_HOSTS if name in REFUSED_DEPTH_KV])
def test_hosts_that_cannot_are_refused_by_name(model_type):
    with pytest.raises(Exception, match=f"depth_kv: 'attention' is not possible on '{model_type}'"):
        DepthAttnConfig.moda(tiny_host_config(model_type), depth_kv="attention")


def test_linear_attention_layers_neither_read_nor_write_keys_of_attention():
    model = moda_model("kimi_linear")
    with torch.no_grad():
        out = model(random_ids(1, 5), output_depth_attentions=True)
    # linear, full, linear: the one reader sees the MLP slot of layer 0 alone, and nobody reads what comes later.
    assert [None if weights is None else weights.shape[-1] for weights in out.depth_kv_attentions] == [None, 1, None]
    names = {name for name, _ in model.named_parameters() if "_depth_kv" in name}
    assert names == {f"model.layers.0.mlp_depth_kv.{leaf}_proj.weight" for leaf in "kv"}
