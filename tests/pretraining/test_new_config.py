"""Configs of new models from every kind of source, with changes, the tokenizer's fields and one-line errors."""

import json

import pytest
from repository import ROOT
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.new_config import field_names, new_config, read_config
from hf_depthattn.pretraining.text_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bytes", ["text"], 0, 16)


def test_sources_are_files_folders_and_model_types(tmp_path):
    tiny_host_config("qwen3").save_pretrained(tmp_path)
    host, depth = read_config(str(tmp_path))
    assert host["model_type"] == "qwen3" and host["hidden_size"] == 32 and depth == {}
    assert read_config(str(tmp_path / "config.json")) == (host, {})
    assert read_config("llama") == ({"model_type": "llama"}, {})
    assert "hidden_size" in field_names(host)


def test_a_config_with_depth_attention_gives_its_options_too(tmp_path):
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), sublayers_per_block=3, depth_kv="attention")
    config.save_pretrained(tmp_path)
    host, depth = read_config(str(tmp_path))
    assert host["model_type"] == "llama" and depth["sublayers_per_block"] == 3 and depth["depth_kv"] == "attention"
    host, depth = read_config(str(ROOT / "examples/configs/moda_700m"))
    assert host["model_type"] == "olmo2" and depth["depth_kv"] == "attention+mlp"


def test_changes_replace_fields_and_others_follow(tokenizer):
    host, _ = read_config("qwen3")
    changes = {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300}
    config = new_config(host, tokenizer, sequence_length=16, changes=changes, connection="residual")
    assert config.num_hidden_layers == 5 and len(config.text_config.layer_types) == 5
    assert config.vocab_size == 300 and config.connection == "residual"
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert new_config(host, tokenizer, sequence_length=16).vocab_size == len(tokenizer)


def test_given_options_replace_saved_ones_in_another_unit(tokenizer, tmp_path):
    slots = [[], [0], [2]]
    saved = DepthAttnConfig(text_config=tiny_host_config("llama"), depth_kv="attention", depth_slots=slots)
    saved.save_pretrained(tmp_path)
    host, depth = read_config(str(tmp_path))
    assert depth["sublayers_per_block"] == 2 and depth["depth_slots"] == slots
    kept = new_config(host, tokenizer, sequence_length=16, saved_options=depth, read_scale="sum")
    assert (kept.sublayers_per_block, kept.depth_slots, kept.read_scale) == (2, slots, "sum")
    given = {"num_blocks": 1, "num_depth_slots": 2}
    config = new_config(host, tokenizer, sequence_length=16, saved_options=depth, **given)
    assert config.block_size_sublayers == 6 and config.depth_slot_plan.num_read == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"vocab_size": 97}, {}, "vocab_size: 97 must be at least 258, the size of the tokenizer"),
        ({"max_position_embeddings": 15}, {}, "max_position_embeddings: 15 must be at least 16, the length of the"),
        ({}, {"connection": "none"}, "connection: 'none' is not one of 'residual', 'attn_res'"),
        ({}, {"num_blocks": 0}, "num_blocks: 0 must be between 1 and"),
        ({"hidden_size": "wide"}, {}, "hidden_size"),
        ({"num_hidden_layers": 10**7}, {}, "num_hidden_layers: 10000000 in its config is more than any model has"),
    ],
)
def test_bad_values_are_one_line(tokenizer, changes, options, message):
    with pytest.raises(UserError, match=message) as caught:
        new_config({"model_type": "llama"}, tokenizer, sequence_length=16, changes=changes, **options)
    assert "\n" not in str(caught.value)


def test_bad_sources_are_one_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model_type": "no_such_type"}))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text(json.dumps({"hidden_size": 3}))
    (tmp_path / "empty").mkdir()
    for name, message in {
        "a.json": "the model type 'no_such_type' is not known to the installed transformers",
        "b.json": "is not valid JSON",
        "c.json": "the model type None is not known",
        "empty": "config.json: is missing",
        "missing": "is no file, folder, model type or model on the Hub",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            read_config(str(tmp_path / name))
        assert "\n" not in str(caught.value)
