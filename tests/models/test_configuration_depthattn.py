"""The configuration: fallback to the host, round trips, and one clear error per bad field."""

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_hosts import tiny_host_config
from transformers import AutoConfig, BertConfig, CohereConfig, LlamaConfig, PreTrainedConfig, T5Config, ViTConfig

from hf_depthattn import DepthAttnConfig

HOST = {"num_hidden_layers": 3}  # six sublayers


class ConfigOfSomebody(PreTrainedConfig):
    """Of a model type that this package has never heard of."""

    model_type = "of_somebody"


# fields, what the message must name: the field, its value, what is allowed
BAD_FIELDS = {
    "unknown connection": ({"connection": "hyper"}, ["connection", "'hyper'", "'attn_res'", "'residual'"]),
    "both block sizes": (
        {"num_blocks": 2, "sublayers_per_block": 2},
        ["num_blocks", "sublayers_per_block", "one of them"],
    ),
    "zero blocks": ({"num_blocks": 0}, ["num_blocks", "0", "between 1 and 6"]),
    "negative blocks": ({"num_blocks": -2}, ["num_blocks", "-2", "between 1 and 6"]),
    "more blocks than sublayers": ({"num_blocks": 7}, ["num_blocks", "7", "between 1 and 6"]),
    "block larger than the model": ({"sublayers_per_block": 9}, ["sublayers_per_block", "9", "between 1 and 6"]),
    "zero sublayers": ({"sublayers_per_block": 0}, ["sublayers_per_block", "0", "between 1 and 6"]),
    "float blocks": ({"num_blocks": 2.0}, ["num_blocks", "2.0", "int"]),
    "string blocks": ({"num_blocks": "2"}, ["num_blocks", "2", "int"]),
    "bad read scale": ({"read_scale": "max"}, ["read_scale", "'max'", "'mean'", "'sum'"]),
    "bad query": ({"query": "token"}, ["query", "'token'", "'static'", "'input'"]),
    "bad activation": ({"depth_activation": "relu"}, ["depth_activation", "'relu'", "'softmax'", "'sigmoid'"]),
    "bad key norm": ({"key_norm": "on"}, ["key_norm", "on", "bool"]),
    "zero heads": ({"num_depth_heads": 0}, ["num_depth_heads", "0", "32"]),
    "heads not a divisor": ({"num_depth_heads": 5}, ["num_depth_heads", "5", "32"]),
    "one stream": ({"connection": "mhc", "num_streams": 1}, ["num_streams", "1", "at least 2"]),
    "many streams": ({"connection": "mhc_lite", "num_streams": 5}, ["num_streams", "5", "at most 4", "'mhc_lite'"]),
    "bad stream mix": ({"stream_mix": "none"}, ["stream_mix", "'none'", "'static'", "'dynamic'"]),
    "no Sinkhorn": ({"connection": "mhc", "sinkhorn_iters": 0}, ["sinkhorn_iters", "0", "at least 1"]),
    "zero window": ({"depth_window": 0}, ["depth_window", "0", "at least 1"]),
    "window with sum": ({"depth_window": 2, "read_scale": "sum"}, ["depth_window", "2", "'mean'"]),
    "zero eps": ({"depth_norm_eps": 0.0}, ["depth_norm_eps", "0.0", "greater than 0"]),
    "unknown depth kv": ({"depth_kv": "mlp"}, ["depth_kv", "'mlp'", "'attention'", "'attention+mlp'"]),
    "bad depth key rope": ({"depth_key_rope": "yes"}, ["depth_key_rope", "'yes'", "'same_position'", "'none'"]),
    "bad depth key norm": ({"depth_key_norm": "none"}, ["depth_key_norm", "'none'", "'writer'", "'reader'"]),
    "bad gate": ({"depth_kv": "attention", "depth_gate": "layer"}, ["depth_gate", "'layer'", "'head'"]),
    "zero slots": ({"depth_kv": "attention", "num_depth_slots": 0}, ["num_depth_slots", "0", "at least 1"]),
    "bad norm position": ({"norm_position": "pre"}, ["norm_position", "'pre'", "'host'", "'post'"]),
    "post-norm with AttnRes": ({"norm_position": "post"}, ["norm_position", "'post'", "connection='residual'"]),
    "static mix with input query": ({"static_mix": True, "query": "input"}, ["query", "'input'", "'static'"]),
}


@pytest.mark.parametrize("fields, named", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_fields_name_field_value_and_what_is_allowed(fields, named, tmp_path):
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        DepthAttnConfig(text_config=tiny_host_config("llama", **HOST), **fields)
    for word in named:
        assert word in str(error.value)
    # The same through from_pretrained, where transformers sets keyword arguments after its validation.
    DepthAttnConfig(text_config=tiny_host_config("llama", **HOST)).save_pretrained(tmp_path)
    for load in (DepthAttnConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises((StrictDataclassError, ValueError)) as error:
            load(tmp_path, **fields)
        for word in named:
            assert word in str(error.value)


@pytest.mark.parametrize(
    "host, named",
    [
        (None, ["text_config", "None", "decoder"]),
        ("llama", ["text_config", "'llama'", "PreTrainedConfig"]),
        ({"hidden_size": 8}, ["text_config", "model_type"]),
        ({"model_type": "no_such_model"}, ["text_config", "no_such_model"]),
        (BertConfig(), ["text_config", "'bert'", "encoder"]),
        (ConfigOfSomebody(), ["text_config", "'of_somebody'", "Supported hosts", "llama"]),
        (ViTConfig(), ["text_config", "'vit'"]),
        (T5Config(), ["text_config", "'t5'", "encoder-decoder"]),
        (CohereConfig(), ["text_config", "'cohere'", "parallel"]),
    ],
    ids=lambda value: getattr(value, "model_type", None) or str(value)[:30],
)
def test_hosts_that_cannot_be_are_refused_by_name(host, named):
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        DepthAttnConfig(text_config=host)
    for word in named:
        assert word in str(error.value)


def test_attributes_resolve_on_the_host_and_are_set_there():
    host = tiny_host_config("mixtral")
    config = DepthAttnConfig(text_config=host)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "num_local_experts"):
        assert getattr(config, name) == getattr(host, name)
    config.vocab_size = 50
    assert host.vocab_size == 50
    assert "vocab_size" not in vars(config)
    config.output_hidden_states = True
    assert host.output_hidden_states
    assert config.get_text_config() is host
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field


def test_host_fields_given_to_the_outer_config_reach_the_host(tmp_path):
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), use_cache=False, tie_word_embeddings=True)
    assert config.text_config.use_cache is False
    assert config.text_config.tie_word_embeddings is True
    config.save_pretrained(tmp_path)
    assert DepthAttnConfig.from_pretrained(tmp_path, use_cache=True).text_config.use_cache is True


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "kimi_linear", "qwen3_moe"])
@pytest.mark.parametrize("fields", [{}, {"sublayers_per_block": 3, "read_scale": "sum"}, {"connection": "residual"}])
def test_json_round_trip_is_exact(model_type, fields, tmp_path):
    config = DepthAttnConfig(text_config=tiny_host_config(model_type), **fields)
    config.save_pretrained(tmp_path / "a")
    for load in (DepthAttnConfig.from_pretrained, AutoConfig.from_pretrained):
        again = load(tmp_path / "a")
        assert type(again) is DepthAttnConfig
        assert type(again.text_config) is type(config.text_config)
        again.save_pretrained(tmp_path / "b")
        assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
        for name, value in fields.items():
            assert getattr(again, name) == value
    # A dict host is the same as a config host.
    same = DepthAttnConfig(text_config=config.text_config.to_dict(), **fields)
    assert same.to_json_string() == config.to_json_string()


def test_unknown_fields_of_a_newer_version_load_with_a_warning(tmp_path, caplog):
    DepthAttnConfig(text_config=tiny_host_config("llama")).save_pretrained(tmp_path)
    file = Path(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "depth_telepathy": 3}))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    own = logging.getLogger("hf_depthattn.configuration_depthattn")
    own.addHandler(caplog.handler)
    try:
        config = DepthAttnConfig.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
        own.removeHandler(caplog.handler)
    assert "depth_telepathy" in caplog.text
    assert config.depth_telepathy == 3


def test_plain_configs_load_without_a_warning(tmp_path, caplog):
    own = logging.getLogger("hf_depthattn.configuration_depthattn")
    DepthAttnConfig(text_config=tiny_host_config("llama"), num_labels=3).save_pretrained(tmp_path)
    own.addHandler(caplog.handler)
    try:
        DepthAttnConfig.from_pretrained(tmp_path, attn_implementation="eager", dtype="bfloat16", num_labels=3)
    finally:
        own.removeHandler(caplog.handler)
    assert not caplog.records


def test_named_constructors():
    host = LlamaConfig(num_hidden_layers=16)
    assert DepthAttnConfig.attn_res(host).block_size_sublayers == 4
    assert DepthAttnConfig.attn_res(host, num_blocks=4).block_size_sublayers == 8
    assert DepthAttnConfig.full_attn_res(host).block_size_sublayers == 1
    assert DepthAttnConfig.residual(host).connection == "residual"
    moda = DepthAttnConfig.moda(host)
    assert (moda.connection, moda.depth_kv) == ("residual", "attention+mlp")
    both = DepthAttnConfig.moda(host, depth_kv="attention", connection="attn_res")
    assert (both.connection, both.depth_kv) == ("attn_res", "attention")
    assert DepthAttnConfig.attn_res({"model_type": "llama", "num_hidden_layers": 2}).block_size_sublayers == 1


def test_labels_problem_type_and_dtype_are_the_hosts_unless_given():
    host = LlamaConfig(num_labels=7, problem_type="multi_label_classification", dtype="bfloat16")
    config = DepthAttnConfig.attn_res(host)
    assert (config.num_labels, config.problem_type) == (7, "multi_label_classification")
    assert str(config.dtype) == "torch.bfloat16"
    assert DepthAttnConfig.attn_res(host, num_labels=3).num_labels == 3


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_eps_must_be_finite(value):
    with pytest.raises(StrictDataclassError, match="depth_norm_eps"):
        DepthAttnConfig(text_config=tiny_host_config("llama"), depth_norm_eps=value)


def test_hosts_without_layers_and_hosts_taken_away_are_refused(tmp_path):
    with pytest.raises((StrictDataclassError, ValueError), match="num_hidden_layers 0"):
        DepthAttnConfig(text_config=tiny_host_config("llama", num_hidden_layers=0))
    DepthAttnConfig(text_config=tiny_host_config("llama")).save_pretrained(tmp_path)
    with pytest.raises((StrictDataclassError, ValueError), match="text_config: None"):
        DepthAttnConfig.from_pretrained(tmp_path, text_config=None)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"connection": "residual", "num_blocks": 2}, "num_blocks"),
        ({"static_mix": True, "key_norm": False}, "key_norm"),
        ({"depth_gate": "head"}, "depth_gate"),
    ],
)
def test_settings_without_effect_are_warned_about(fields, named, caplog):
    own = logging.getLogger("hf_depthattn.configuration_depthattn")
    own.addHandler(caplog.handler)
    try:
        DepthAttnConfig(text_config=tiny_host_config("llama"), **fields)
    finally:
        own.removeHandler(caplog.handler)
    assert f"{named} have no effect" in caplog.text


@pytest.mark.parametrize("host", ["olmo2", "gemma2"])
def test_post_norm_needs_a_pre_norm_host(host):
    with pytest.raises(StrictDataclassError, match=f"norm_position: 'post' needs a pre-norm host, but '{host}'"):
        DepthAttnConfig(text_config=tiny_host_config(host), connection="residual", norm_position="post")


@pytest.mark.parametrize("fields", [{"depth_key_rope": "none"}, {"depth_key_norm": "reader"}])
@pytest.mark.parametrize("host", ["hunyuan_v1_dense", "nanochat"])
def test_key_rules_that_a_host_cannot_follow_are_refused(host, fields):
    (field,) = fields
    with pytest.raises(StrictDataclassError, match=f"{field}: .* is not possible on '{host}'"):
        DepthAttnConfig.moda(tiny_host_config(host), **fields)


def test_a_host_without_softmax_attention_has_no_depth_slots():
    host = tiny_host_config("kimi_linear", layer_types=["linear_attention"] * 3)
    with pytest.raises(
        StrictDataclassError, match="depth_kv: 'attention' needs a host with at least one softmax attention layer"
    ):
        DepthAttnConfig.moda(host, depth_kv="attention")


def test_slots_that_nobody_reads_are_not_written():
    host = tiny_host_config("llama", num_hidden_layers=4)
    plan = DepthAttnConfig.moda(host).depth_slot_plan
    assert plan.num_read == (0, 2, 4, 6)
    assert plan.attention_writes == plan.mlp_writes == {0, 1, 2}, "the last layer's are read by nobody"
    plan = DepthAttnConfig.moda(host, depth_kv="attention").depth_slot_plan
    assert (plan.num_read, plan.mlp_writes) == ((0, 1, 2, 3), frozenset())
    plan = DepthAttnConfig.moda(host, num_depth_slots=1).depth_slot_plan
    assert plan.num_read == (0, 1, 1, 1)
    assert (plan.attention_writes, plan.mlp_writes) == (frozenset(), {0, 1, 2}), "the newest slot is the MLP's"
    plan = DepthAttnConfig.moda(tiny_host_config("kimi_linear")).depth_slot_plan  # linear, full, linear
    assert (plan.num_read, plan.attention_writes, plan.mlp_writes) == ((0, 1, 0), frozenset(), {0})


@pytest.mark.parametrize("model_type", ["llama4", "gemma4", "qwen3_5", "glm4v", "gemma3n", "llava"])
def test_a_multimodal_config_is_refused_with_what_to_pass_instead(model_type):
    with pytest.raises(StrictDataclassError, match="pass the config of its language model"):
        DepthAttnConfig(text_config=AutoConfig.for_model(model_type))
