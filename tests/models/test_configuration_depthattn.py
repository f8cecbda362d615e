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
    "slots by name": ({"depth_kv": "attention", "depth_slots": [[], ["attn"], []]}, ["depth_slots", "attn", "int"]),
    "slots of two layers": (
        {"depth_kv": "attention", "depth_slots": [[], [0]]},
        ["depth_slots: 2 lists", "num_hidden_layers is 3"],
    ),
    "slot of the first layer": (
        {"depth_kv": "attention", "depth_slots": [[0], [], []]},
        ["depth_slots: layer 0", "slot 0", "none"],
    ),
    "slot of a later sublayer": (
        {"depth_kv": "attention+mlp", "depth_slots": [[], [0], [4]]},
        ["depth_slots: layer 2", "slot 4", "0, 1, 2, 3"],
    ),
    "slot that nobody writes": (
        {"depth_kv": "attention", "depth_slots": [[], [], [1]]},
        ["depth_slots: layer 2", "slot 1", "0, 2"],
    ),
    "slot twice": (
        {"depth_kv": "attention", "depth_slots": [[], [0], [2, 2]]},
        ["depth_slots: layer 2", "[2, 2]", "once, in ascending order", "0, 2"],
    ),
    "slots out of order": ({"depth_kv": "attention", "depth_slots": [[], [0], [2, 0]]}, ["layer 2", "[2, 0]"]),
    "no slots": (
        {"depth_kv": "attention+mlp", "depth_slots": [[], [], []]},
        ["depth_slots: [[], [], []]", "depth_kv='attention+mlp'", "at least one layer"],
    ),
    "two limits of slots": (
        {"depth_kv": "attention", "depth_slots": [[], [0], [2]], "num_depth_slots": 1},
        ["num_depth_slots: 1", "depth_slots: [[], [0], [2]]", "one of them"],
    ),
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
    assert config.get_text_config() is config
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
    assert DepthAttnConfig.attn_res({"model_type": "llama", "num_hidden_layers": 2}).block_size_sublayers == 2


# Layers -> sublayers per block. 27 layers: the paper; 93: Kimi K3; 48: Inkling 2.
@pytest.mark.parametrize(
    "num_layers, size",
    [(27, 6), (93, 24), (48, 12), (12, 4), (13, 4), (14, 4), (16, 4), (17, 4), (20, 6), (5, 2), (3, 2), (1, 2)],
)
def test_default_block_is_the_whole_number_of_layers_nearest_to_eight_blocks(num_layers, size):
    assert DepthAttnConfig.attn_res(LlamaConfig(num_hidden_layers=num_layers)).block_size_sublayers == size


@pytest.mark.parametrize(
    "num_layers, num_blocks, size",
    [(27, 8, 8), (27, 9, 6), (27, 1, 54), (13, 8, 4), (4, 3, 4), (3, 3, 2), (3, 4, 2), (3, 5, 2), (3, 6, 1)],
)
def test_num_blocks_rounds_up_to_whole_layers_except_for_full_attn_res(num_layers, num_blocks, size):
    config = DepthAttnConfig.attn_res(LlamaConfig(num_hidden_layers=num_layers), num_blocks=num_blocks)
    assert config.block_size_sublayers == size


def test_an_odd_block_size_can_be_given():
    assert DepthAttnConfig.attn_res(LlamaConfig(), sublayers_per_block=7).block_size_sublayers == 7


@pytest.mark.parametrize("fields, size", [({}, 6), ({"num_blocks": 4}, 14), ({"sublayers_per_block": 5}, 5)])
def test_the_block_size_is_saved_itself(fields, size, tmp_path):
    DepthAttnConfig.attn_res(LlamaConfig(num_hidden_layers=27), **fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["num_blocks"], saved["sublayers_per_block"]) == (None, size)
    assert DepthAttnConfig.from_pretrained(tmp_path).block_size_sublayers == size
    # An argument replaces the saved size, in either unit.
    assert DepthAttnConfig.from_pretrained(tmp_path, num_blocks=9).block_size_sublayers == 6
    assert DepthAttnConfig.from_pretrained(tmp_path, sublayers_per_block=3).block_size_sublayers == 3


@pytest.mark.parametrize("num_blocks, size", [(None, 7), (8, 7), (4, 14), (54, 1)])
def test_a_checkpoint_of_an_older_version_keeps_its_blocks_and_eps(num_blocks, size, tmp_path):
    """Older versions saved no size, rounded to sublayers, and always saved an epsilon."""
    host = LlamaConfig(num_hidden_layers=27, rms_norm_eps=1e-5)
    DepthAttnConfig.attn_res(host).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    older = {"num_blocks": num_blocks, "sublayers_per_block": None, "depth_norm_eps": 1e-6}
    file.write_text(json.dumps({**json.loads(file.read_text()), **older}))
    for load in (DepthAttnConfig.from_pretrained, AutoConfig.from_pretrained):
        config = load(tmp_path)
        assert (config.block_size_sublayers, config.resolved_depth_norm_eps) == (size, 1e-6)
    config.save_pretrained(tmp_path / "again")
    again = DepthAttnConfig.from_pretrained(tmp_path / "again")
    assert (again.block_size_sublayers, again.resolved_depth_norm_eps) == (size, 1e-6)


def test_a_checkpoint_without_blocks_is_not_one_of_an_older_version(tmp_path):
    DepthAttnConfig.residual(LlamaConfig(num_hidden_layers=27)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sublayers_per_block"] is None
    assert DepthAttnConfig.from_pretrained(tmp_path, connection="attn_res").block_size_sublayers == 6


def test_an_argument_replaces_saved_slots_in_either_unit(tmp_path):
    slots = [[], [0], [2]]
    DepthAttnConfig.moda(tiny_host_config("llama", **HOST), depth_slots=slots).save_pretrained(tmp_path / "listed")
    newest = DepthAttnConfig.from_pretrained(tmp_path / "listed", num_depth_slots=3)
    assert newest.depth_slots is None and newest.depth_slot_plan.num_read == (0, 2, 3)
    newest.save_pretrained(tmp_path / "newest")
    listed = DepthAttnConfig.from_pretrained(tmp_path / "newest", depth_slots=slots)
    assert listed.num_depth_slots is None and listed.depth_slot_plan.num_read == (0, 1, 1)


def test_a_config_without_fields_of_blocks_has_the_default(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "depthattn", "text_config": {"model_type": "llama", "num_hidden_layers": 27}})
    )
    assert AutoConfig.from_pretrained(tmp_path).block_size_sublayers == 6


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
        ({"connection": "hyper_connections", "stream_mix": "static", "depth_norm_eps": 1e-6}, "depth_norm_eps"),
        ({"key_norm": False, "depth_norm_eps": 1e-5}, "depth_norm_eps"),
        ({"depth_gate": "head"}, "depth_gate"),
        ({"depth_slots": [[], [0], [2]]}, "depth_slots"),
        ({"depth_kv": "attention", "depth_kv_bias": True}, "depth_kv_bias"),
    ],
)
def test_settings_without_effect_are_warned_about(fields, named, caplog):
    DepthAttnConfig(text_config=tiny_host_config("llama"), **fields)
    assert f"{named} has no effect" in caplog.text


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
    plan = DepthAttnConfig.moda(host, depth_slots=[[], [], [1], [0, 4]]).depth_slot_plan
    assert plan.reads == ((), (), (1,), (0, 4))
    assert (plan.num_read, plan.attention_writes, plan.mlp_writes) == ((0, 0, 1, 2), {0, 2}, {0})
    assert [plan.present(layer) for layer in range(5)] == [(), (0, 1), (0, 1), (0, 4), ()]
    plan = DepthAttnConfig.moda(tiny_host_config("kimi_linear")).depth_slot_plan  # linear, full, linear
    assert (plan.num_read, plan.attention_writes, plan.mlp_writes) == ((0, 1, 0), frozenset(), {0})


def test_slots_of_layers_without_attention_are_refused_by_layer():
    host = tiny_host_config("kimi_linear")  # linear, full, linear
    assert DepthAttnConfig.moda(host, depth_slots=[[], [1], []]).depth_slot_plan.mlp_writes == {0}
    with pytest.raises(StrictDataclassError, match=r"layer 1 cannot read slot 0; allowed are 1\."):
        DepthAttnConfig.moda(host, depth_slots=[[], [0], []])
    with pytest.raises(StrictDataclassError, match="layer 2 cannot read slot 1; allowed are none"):
        DepthAttnConfig.moda(host, depth_slots=[[], [], [1]])


@pytest.mark.parametrize("model_type", ["llama4", "gemma4", "qwen3_5", "glm4v", "gemma3n", "llava"])
def test_a_multimodal_config_is_refused_with_what_to_pass_instead(model_type):
    with pytest.raises(StrictDataclassError, match="pass the config of its language model"):
        DepthAttnConfig(text_config=AutoConfig.for_model(model_type))
