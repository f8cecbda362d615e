"""What `retrofit` refuses, and that it says why in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import edit_config, save_stock, weights_of
from transformers import GPT2Config
from transformers.utils import logging

from hf_depthattn.checkpoints import checkpoint_files
from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE
from hf_depthattn.conversion import architecture
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "sharded", max_shard_size="20KB")


@pytest.fixture
def damaged(sharded, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / "damaged"))


def drop_weights(folder):
    for path in weights_of(folder):
        path.unlink()
    (folder / INDEX_FILE).unlink()


def pickle_only(folder):
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")


def cut(folder, num_bytes):
    os.truncate(weights_of(folder)[1], num_bytes)


def move_tensor_in_index(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    tensor = next(tensor for tensor, name in index["weight_map"].items() if name == names[0])
    index["weight_map"][tensor] = names[1]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def point_index_elsewhere(folder):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))


def overwrite_shard(folder, content):
    weights_of(folder)[1].write_bytes(content)


def rename_keys(folder):
    drop_weights(folder)
    save_file({"backbone.layers.0.mlp.weight": torch.zeros(2)}, folder / SINGLE_FILE)


# label -> what is done to a checkpoint, what the message says
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json: is missing"]),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "no model type": (lambda f: edit_config(f, model_type=None), ["no 'model_type'"]),
    "bad host field": (lambda f: edit_config(f, hidden_size="big"), ["hidden_size", "'big'"]),
    "encoder": (lambda f: edit_config(f, model_type="bert"), ["'bert' cannot be a host"]),
    "encoder-decoder": (lambda f: edit_config(f, model_type="t5"), ["'t5' cannot be a host", "encoder-decoder"]),
    "parallel layers": (lambda f: edit_config(f, model_type="cohere"), ["'cohere' cannot be a host", "in parallel"]),
    "unknown model type": (lambda f: edit_config(f, model_type="llamma"), ["'llamma' is not known to transformers"]),
    "own class": (lambda f: edit_config(f, architectures=["LlamaForMusic"]), ["'LlamaForMusic'", "LlamaForCausalLM"]),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["is quantised", "unquantised"]),
    "no weights": (drop_weights, [f"no {SINGLE_FILE}", "save_pretrained()"]),
    "pickle only": (pickle_only, ["only pickle weights (pytorch_model.bin)", "save_pretrained()"]),
    "missing shard": (lambda f: weights_of(f)[1].unlink(), ["model-00002-of", "missing", INDEX_FILE]),
    "truncated shard": (lambda f: cut(f, 4000), ["model-00002-of", "cut short", "4000 bytes"]),
    "truncated header": (lambda f: cut(f, 100), ["model-00002-of", "cut short inside its header"]),
    "empty shard": (lambda f: cut(f, 0), ["model-00002-of", "not a safetensors file"]),
    "web page": (lambda f: overwrite_shard(f, b"<!doctype html>" * 9), ["model-00002-of", "not a safetensors file"]),
    "broken header": (
        lambda f: overwrite_shard(f, (4).to_bytes(8, "little") + b"{]  "),
        ["model-00002-of", "header is not a safetensors header"],
    ),
    "trailing bytes": (
        lambda f: overwrite_shard(f, weights_of(f)[1].read_bytes() + b"0"),
        ["model-00002-of", "too long"],
    ),
    "wrong index": (move_tensor_in_index, ["model-00002-of", "does not contain tensor", INDEX_FILE]),
    "index leaves the folder": (point_index_elsewhere, [INDEX_FILE, "'../other.safetensors'"]),
    "empty index": (lambda f: (f / INDEX_FILE).write_text("{}"), [INDEX_FILE, "no 'weight_map'"]),
    "too few layers": (lambda f: edit_config(f, num_hidden_layers=9), ["9 layers", "no tensor of layer 3"]),
    "other keys": (rename_keys, ["'backbone.'", "not with 'model.'"]),
}


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_source_that_cannot_be_used_is_refused_in_one_line(damage, named, damaged, tmp_path):
    damage(damaged)
    with pytest.raises(UserError) as error:
        retrofit(damaged, tmp_path / "out")
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in named), message
    assert os.listdir(tmp_path) == ["damaged"]


# label -> arguments, what the message says
BAD_ARGUMENTS = {
    "mean": ({"read_scale": "mean"}, ["read_scale", "'mean' does not reproduce the host"]),
    "unknown read scale": ({"read_scale": "max"}, ["read_scale", "'max'", "'sum'"]),
    "window": ({"depth_window": 2}, ["depth_window", "does not reproduce the host"]),
    "both block sizes": ({"num_blocks": 2, "sublayers_per_block": 2}, ["num_blocks: 2", "one of them"]),
    "too many blocks": ({"num_blocks": 7}, ["num_blocks: 7", "between 1 and 6"]),
    "text": ({"num_blocks": "2"}, ["'num_blocks'", "'2'", "int"]),
    "connection": ({"connection": "hyper"}, ["connection", "'hyper'", "'attn_res'"]),
    "unknown field": ({"num_block": 2}, ["num_block", "not an option", "num_blocks"]),
    "field of the host": ({"hidden_size": 2}, ["hidden_size", "not an option"]),
    "revision": ({"revision": "main"}, ["revision", "local folder"]),
    "tokenizer": ({"require_tokenizer": True}, ["no tokenizer", "--allow-missing-tokenizer"]),
}


@pytest.mark.parametrize("arguments, named", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused_in_one_line(arguments, named, stock, tmp_path):
    source = stock
    if "require_tokenizer" in arguments:
        source = Path(shutil.copytree(stock, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(UserError) as error:
        retrofit(source, tmp_path / "out", **arguments)
    message = str(error.value)
    assert "\n" not in message and all(words in message for words in named), message
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_refused(stock, tmp_path):
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "nowhere/"):
        with pytest.raises(UserError, match="no such folder"):
            retrofit(source, tmp_path / "out")
    with pytest.raises(UserError, match="is empty"):
        retrofit("", tmp_path / "out")
    # The tests run offline.
    with pytest.raises(UserError, match="someone/nothing: neither a local folder nor available on the Hub"):
        retrofit("someone/nothing", tmp_path / "out")
    with pytest.raises(UserError, match="is a file"):
        retrofit(stock / "config.json", tmp_path / "out")


def test_a_retrofitted_source_is_refused(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    with pytest.raises(UserError, match="already a depth attention checkpoint"):
        retrofit(tmp_path / "out", tmp_path / "again")


def test_gpt2_is_refused_before_its_weights_are_looked_at(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="'gpt2' cannot be a host"):
        retrofit(tmp_path / "gpt2", tmp_path / "out")


def test_a_missing_tokenizer_is_a_warning(stock, tmp_path, monkeypatch):
    bare = Path(shutil.copytree(stock, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    warnings = []
    logger = logging.get_logger("hf_depthattn.checkpoints.carried_files")
    monkeypatch.setattr(logger, "warning", warnings.append)
    retrofit(bare, tmp_path / "out")
    assert len(warnings) == 1 and "no tokenizer" in warnings[0]


def test_key_prefix_is_that_of_the_decoder_layers():
    def prefix(*keys):
        weights = checkpoint_files.WeightFiles((), dict.fromkeys(keys, SINGLE_FILE))
        return architecture.key_prefix_of(Path("folder"), weights, 1)

    assert prefix("model.mtp_layers.0.norm", "model.layers.0.norm") == "model."
    assert prefix("mtp.layers.0.norm", "layers.0.norm") == ""
    with pytest.raises(UserError, match="no tensor of a decoder layer"):
        prefix("model.embed_tokens.weight")
