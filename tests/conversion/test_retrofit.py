"""Retrofit: the same logits and greedy text, what is on disk."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from model_checks import is_depth_key, relative_max_error
from processes import run_python
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import CHECKPOINTS, load, logits, save_stock, weights_of
from tiny_hosts import NUM_LAYERS, random_ids, tiny_host_config, tiny_stock_model
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
)

import hf_depthattn
from hf_depthattn.checkpoints import checkpoint_files
from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE, read_weight_files
from hf_depthattn.conversion import depth_shards
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "sharded", max_shard_size="20KB")


# --- exactness ---


@pytest.mark.parametrize("model_type, max_shard_size", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_retrofit_keeps_logits_and_greedy_text_and_restore_gives_the_checkpoint_back(
    model_type, max_shard_size, tmp_path
):
    source = save_stock(tmp_path / "stock", model_type, max_shard_size=max_shard_size, tokenizer=False)
    assert (len(weights_of(source)) > 1) == (max_shard_size == "20KB")
    report = retrofit(source, tmp_path / "out", num_blocks=4)
    assert report.model_type == model_type and report.num_hidden_layers == NUM_LAYERS and report.num_sources == 4

    host, model = load(source), load(tmp_path / "out")
    assert isinstance(model, hf_depthattn.DepthAttnForCausalLM)
    ids = random_ids(2, 21)
    expected = logits(host, ids)
    assert relative_max_error(logits(model, ids), expected) <= 1e-5
    texts = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (host, model)]
    assert torch.equal(*texts)

    report = restore(tmp_path / "out", tmp_path / "restored")
    assert report.architecture == type(host).__name__ and report.num_depth_tensors == 2
    restored = load(tmp_path / "restored")
    assert type(restored) is type(host)
    assert torch.equal(logits(restored, ids), expected)
    assert [path.stat().st_ino for path in weights_of(tmp_path / "restored")] == [
        path.stat().st_ino for path in weights_of(source)
    ]
    assert (tmp_path / "restored" / "config.json").read_text() == (source / "config.json").read_text()
    assert not list((tmp_path / "restored").glob("*.py"))


def test_real_checkpoint(depthattn_data, tmp_path):
    source = depthattn_data / "stories260K" / "hf"
    retrofit(source, tmp_path / "out")
    host, model = load(source), load(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(
        "Once upon a time, there was a", return_tensors="pt"
    ).input_ids
    assert relative_max_error(logits(model, ids), logits(host, ids)) <= 1e-5
    texts = [m.generate(ids, max_new_tokens=40, do_sample=False) for m in (host, model)]
    assert torch.equal(*texts)


CONFIG_FIELDS = {
    "Full AttnRes": {"sublayers_per_block": 1},
    "odd blocks": {"sublayers_per_block": 5},
    "input query": {"query": "input"},
    "sigmoid, two heads": {"depth_activation": "sigmoid", "num_depth_heads": 2},
    "static mix": {"static_mix": True},
    "no key norm": {"key_norm": False},
    "residual control": {"connection": "residual"},
}


@pytest.mark.parametrize("fields", CONFIG_FIELDS.values(), ids=CONFIG_FIELDS.keys())
def test_options_keep_the_logits(fields, stock, tmp_path):
    report = retrofit(stock, tmp_path / "out", **fields)
    model = load(tmp_path / "out")
    ids = random_ids(1, 19)
    assert relative_max_error(logits(model, ids), logits(load(stock), ids)) <= 1e-5
    for field, value in fields.items():
        assert getattr(model.config, field) == value
    depth = [parameter for name, parameter in model.named_parameters() if is_depth_key(name)]
    assert report.num_depth_parameters == sum(parameter.numel() for parameter in depth)
    restore(tmp_path / "out", tmp_path / "restored")
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(load(stock), ids))


def test_half_precision_checkpoint_keeps_its_dtype_and_float32_depth_parameters(tmp_path):
    tiny_stock_model("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    retrofit(tmp_path / "stock", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = load(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_depth_key(name) else torch.bfloat16), name
    restore(tmp_path / "out", tmp_path / "restored")
    assert load(tmp_path / "restored").dtype == torch.bfloat16


def test_base_model_keeps_keys_without_prefix(tmp_path):
    source = save_stock(tmp_path / "causal", tokenizer=False)
    AutoModel.from_pretrained(source).save_pretrained(tmp_path / "base")
    report = retrofit(tmp_path / "base", tmp_path / "out")
    assert report.architecture == "DepthAttnModel"
    assert "depth_reads.query" in read_weight_files(tmp_path / "out").weight_map
    ids = random_ids(1, 17)
    outputs = [load(tmp_path / name, AutoModel)(ids)[0] for name in ("base", "out")]
    assert relative_max_error(*outputs) <= 1e-5
    assert restore(tmp_path / "out", tmp_path / "restored").architecture == "LlamaModel"
    assert torch.equal(load(tmp_path / "restored", AutoModel)(ids)[0], outputs[0])


def test_sequence_classifier_keeps_its_labels(tmp_path):
    names = {0: "calm", 1: "joyful", 2: "sad"}
    config = tiny_host_config("llama", id2label=names, label2id={name: i for i, name in names.items()})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "stock")
    report = retrofit(tmp_path / "stock", tmp_path / "out")
    assert report.architecture == "DepthAttnForSequenceClassification"
    host, model = (load(tmp_path / name, AutoModelForSequenceClassification) for name in ("stock", "out"))
    assert model.config.id2label == names and model.config.num_labels == 3
    ids = random_ids(2, 17)
    assert relative_max_error(logits(model, ids), logits(host, ids)) <= 1e-5
    restore(tmp_path / "out", tmp_path / "restored")
    restored = load(tmp_path / "restored", AutoModelForSequenceClassification)
    assert restored.config.id2label == names
    assert torch.equal(logits(restored, ids), logits(host, ids))


# --- what is on disk ---


def test_question_answering_heads_keep_their_other_prefix(tmp_path):
    """`transformer.layers. ...` in the heads of many hosts, in memory and in files."""
    stock = LlamaForQuestionAnswering(tiny_host_config("llama")).eval()
    stock.save_pretrained(tmp_path / "stock")
    retrofit(tmp_path / "stock", tmp_path / "out")
    model = load(tmp_path / "out", AutoModelForQuestionAnswering)
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert relative_max_error(model(ids).start_logits, stock(ids).start_logits) <= 1e-5
    restore(tmp_path / "out", tmp_path / "restored")
    restored = load(tmp_path / "restored", AutoModelForQuestionAnswering)
    assert torch.equal(restored(ids).end_logits, stock(ids).end_logits)


def test_weights_are_hard_links_and_the_index_names_everything(sharded, tmp_path):
    before = {path.name: path.stat().st_nlink for path in weights_of(sharded)}
    report = retrofit(sharded, tmp_path / "out")
    files = weights_of(tmp_path / "out")
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    for old, new in zip(weights_of(sharded), files, strict=False):
        assert new.stat().st_ino == old.stat().st_ino and old.stat().st_nlink == before[old.name] + 1
    assert report.bytes_linked == sum(path.stat().st_size for path in weights_of(sharded))
    assert report.bytes_copied == 0 and report.bytes_written == files[-1].stat().st_size

    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    stored = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            stored |= {name: (path.name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for _, tensor in stored.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in stored.values())

    depth = {name: tensor for name, (file, tensor) in stored.items() if file == files[-1].name}
    assert set(depth) == {"model.depth_reads.query", "model.depth_reads.key_norm"}
    shape = 2 * NUM_LAYERS + 1, 32
    for name, tensor in depth.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.zeros(shape) if name.endswith("query") else torch.ones(shape)), name


def test_weights_are_copied_where_links_are_not_possible(sharded, tmp_path, monkeypatch):
    def no_links(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 1000)
    report = retrofit(sharded, tmp_path / "out")
    assert report.bytes_linked == 0 and report.bytes_copied == sum(p.stat().st_size for p in weights_of(sharded))
    for old, new in zip(weights_of(sharded), weights_of(tmp_path / "out"), strict=False):
        assert new.read_bytes() == old.read_bytes() and new.stat().st_ino != old.stat().st_ino


def test_copy_can_be_asked_for(stock, tmp_path):
    assert retrofit(stock, tmp_path / "out", copy=True).bytes_linked == 0
    assert weights_of(tmp_path / "out")[0].stat().st_nlink == 1


def test_symbolic_links_of_the_hub_cache_are_followed(stock, tmp_path):
    """Both forms: blobs of the repository, and blobs that repositories share, to which the former are links."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--llama" / "snapshots" / "0123abc"
    own, shared = snapshot.parent.parent / "blobs", cache / "blobs" / "ab"
    for folder in (snapshot, own, shared):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(stock.iterdir())):
        blob = own / f"etag{number}"
        if path.name == SINGLE_FILE:
            os.link(path, shared / "abcdef")
            blob.symlink_to(os.path.relpath(shared / "abcdef", own))
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    retrofit(snapshot, tmp_path / "elsewhere" / "out")
    placed = weights_of(tmp_path / "elsewhere" / "out")[0]
    assert not placed.is_symlink() and placed.stat().st_ino == (stock / SINGLE_FILE).stat().st_ino
    load(tmp_path / "elsewhere" / "out")


def test_large_depth_parameters_are_split_into_shards(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(depth_shards, "MAX_SHARD_BYTES", 10_000)
    retrofit(stock, tmp_path / "out", query="input")
    files = weights_of(tmp_path / "out")
    assert len(files) > 3 and all(path.stat().st_size < 12_000 for path in files[1:])
    load(tmp_path / "out")


def test_small_files_come_along_and_code_and_training_files_do_not(stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    carried = {
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "terms",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "tokenization_own.py": "from .own_vocabulary import words\n",
        "own_vocabulary.py": "words = []\n",
    }
    left = {
        "modeling_own.py": "raise RuntimeError\n",
        "README.md": "---\nlicense: mit\nlanguage: en\nmetrics: [bleu]\n---\nold card\n",
        "training_args.bin": "",
        "trainer_state.json": "{}",
    }
    code = ("own_vocabulary.py", "tokenization_own.py")
    (source / "additional_chat_templates").mkdir()
    for name, content in (carried | left).items():
        (source / name).write_text(content)
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert retrofit(source, tmp_path / "out", copy_tokenizer_code=True).tokenizer_code == code
    assert restore(tmp_path / "out", tmp_path / "restored", copy_tokenizer_code=True).tokenizer_code == code
    for output in (tmp_path / "out", tmp_path / "restored"):
        for name in (*carried, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (output / name).read_bytes() == (source / name).read_bytes(), name
        for name in left:
            assert not (output / name).exists() or name == "README.md", name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "language: en" in card and "old card" not in card and "metrics" not in card


def test_nothing_names_this_machine(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".json", ".md"):
            assert str(stock.parent) not in path.read_text() and str(tmp_path) not in path.read_text(), path


def test_loads_with_remote_code_where_the_package_is_absent(stock, tmp_path):
    retrofit(stock, tmp_path / "out", num_blocks=2)
    ids = random_ids(1, 16)
    save_file({"ids": ids, "logits": logits(load(stock), ids)}, tmp_path / "reference.st")
    code = """
import sys
sys.modules["hf_depthattn"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
reference = load_file("reference.st")
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
error = (model(reference["ids"]).logits - reference["logits"]).abs().max() / reference["logits"].abs().max()
assert error <= 1e-5, error
assert AutoTokenizer.from_pretrained("out").decode(model.generate(reference["ids"], max_new_tokens=3)[0])
"""
    result = run_python("-c", code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr


def test_saving_into_the_output_leaves_the_source_alone(sharded, tmp_path):
    before = {path.name: path.read_bytes() for path in weights_of(sharded)}
    retrofit(sharded, tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    # the same number of shards, hence the same names.
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in weights_of(sharded)} == before


def test_hub_id_is_downloaded_and_named_in_the_card(stock, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repo_id, revision=None, **kwargs):
        calls.append((repo_id, revision, kwargs["allow_patterns"]))
        return str(stock)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    report = retrofit("someone/small-llama", tmp_path / "out", revision="main")
    assert report.source == "someone/small-llama"
    assert [call[:2] for call in calls] == [("someone/small-llama", "main")] * 2
    # First what names the shards, then only these.
    assert "*.safetensors" not in calls[0][2] and calls[1][2] == [SINGLE_FILE]
    assert "base_model: someone/small-llama" in (tmp_path / "out" / "README.md").read_text()
