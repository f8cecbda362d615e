"""Checkpoints saved when every site had a query and a key-norm weight of its own, by the code of that time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_checks import is_depth_key
from repository import DATA
from safetensors.torch import load_file, save_file
from tiny_checkpoints import load, logits, save_stock, weights_of
from tiny_hosts import ALL_HOSTS, random_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_depthattn.checkpoint_keys import stacked_name
from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE, read_weight_files
from hf_depthattn.checkpoints.model_loading import load_model
from hf_depthattn.checkpoints.old_sites import in_old_layout, site_name, stack_old_sites
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify.verify import verify

FOLDER = DATA / "saved_with_queries_in_sites"
CHECKPOINT = FOLDER / "causal_lm"
IDS = torch.arange(3, 12)[None]


def old_tensors() -> dict[str, torch.Tensor]:
    return load_file(CHECKPOINT / SINGLE_FILE)


def assert_computes_the_same(model) -> None:
    expected = torch.tensor(json.loads((FOLDER / "expected.json").read_text())["causal_lm"])
    found = logits(model.eval(), IDS).flatten()[-40:]
    assert torch.allclose(found, expected, atol=2e-6), (found - expected).abs().max()


def save_changed(folder: Path, change) -> Path:
    """Save a copy of the checkpoint with other tensors."""
    tensors = old_tensors()
    change(tensors)
    shutil.copytree(CHECKPOINT, folder)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


def save_in_old_layout(folder: Path) -> None:
    """Give the depth tensors of a checkpoint the names of the old layout."""
    file = weights_of(folder)[-1]
    tensors = load_file(file)
    new = {name: tensors.pop(name) for name in list(tensors) if "depth_reads." in name}
    names = in_old_layout({name: tuple(tensor.shape) for name, tensor in new.items()}, 3)
    rows = (row.clone() for tensor in new.values() for row in tensor)
    old = dict(zip(names, rows, strict=True))
    save_file(tensors | old, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = {name: path for name, path in content["weight_map"].items() if name not in new}
    index.write_text(json.dumps(content | {"weight_map": files | dict.fromkeys(old, file.name)}))


def zero_queries_and_gates(tensors) -> None:
    for name in tensors:
        if name.endswith((".query", ".gate")):
            tensors[name].zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_from_pretrained_stacks_them(dtype):
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    reads, old = model.model.depth_reads, old_tensors()
    sites = [site_name(site, 2) for site in range(5)]
    assert sites == [f"layers.{site}_depth" for site in ("0.attn", "0.mlp", "1.attn", "1.mlp", "1.out")]
    assert torch.equal(reads.query, torch.stack([old[f"model.{site}.query"] for site in sites]))
    assert torch.equal(reads.key_norm, torch.stack([old[f"model.{site}.key_norm.weight"] for site in sites]))
    if dtype == torch.float32:
        assert_computes_the_same(model)


def test_load_state_dict_and_the_commands_load_them(tmp_path):
    model = AutoModelForCausalLM.from_config(load(CHECKPOINT).config)
    model.load_state_dict(old_tensors())
    assert_computes_the_same(model)
    assert_computes_the_same(load_model(CHECKPOINT))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / SINGLE_FILE)
    assert saved.keys() == stack_old_sites(old_tensors()).keys()
    assert {name for name in saved if "depth_reads" in name} == {
        "model.depth_reads.query",
        "model.depth_reads.key_norm",
    }
    assert_computes_the_same(load(tmp_path))


def test_trainer_resumes_from_them(tmp_path):
    """Without its optimizer, whose states are those of other parameters."""
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 5) % 20]
    fields = {"max_steps": 1, "learning_rate": 0.0, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path), save_steps=1, **fields)
    config = load(CHECKPOINT).config
    Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows).train()
    saved = tmp_path / "checkpoint-1"
    shutil.copy(CHECKPOINT / SINGLE_FILE, saved)
    (saved / "optimizer.pt").unlink()
    resumed = Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(saved))
    assert_computes_the_same(resumed.model)


def test_a_wrapper_that_loads_them_into_the_decoder_is_told_so():
    model = load(CHECKPOINT)
    wrapper = torch.nn.ModuleDict({"wrapped": model})
    state = {f"wrapped.{name}": tensor for name, tensor in old_tensors().items()}
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn_depth\.key_norm\.weight: .* like 9 other .*convert_adapter"
    ):
        wrapper.load_state_dict(state, strict=False)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", *(["exaone"] if "exaone" in ALL_HOSTS else [])])
@pytest.mark.parametrize("fields", [{}, {"query": "input"}, {"key_norm": False}], ids=["default", "input", "no norm"])
def test_retrofits_are_verified_and_restored(model_type, fields, tmp_path):
    stock = save_stock(tmp_path / "stock", model_type)
    retrofit(stock, tmp_path / "out", copy=True, **fields)
    save_in_old_layout(tmp_path / "out")
    names = read_weight_files(tmp_path / "out").weight_map
    assert sum(stacked_name(name) is not None for name in names) == (7 if "key_norm" in fields else 14)
    assert verify(stock, tmp_path / "out", max_new_tokens=2).ok
    report = restore(tmp_path / "out", tmp_path / "restored")
    assert report.num_depth_tensors == sum(map(is_depth_key, names))
    ids = random_ids(1, 9)
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(load(stock), ids))


def test_restore_names_sites_that_have_moved(tmp_path):
    def move(tensors):
        zero_queries_and_gates(tensors)
        tensors["model.layers.1.out_depth.query"][0] = float("nan")
        tensors["model.layers.0.mlp_depth.query"][3] = 1e-8

    restore(save_changed(tmp_path / "zero", zero_queries_and_gates), tmp_path / "restored")
    assert not any(map(is_depth_key, read_weight_files(tmp_path / "restored").weight_map))
    named = r"2 of 6 depth modules have been trained \(layers\.0\.mlp_depth, layers\.1\.out_depth\)"
    with pytest.raises(UserError, match=named):
        restore(save_changed(tmp_path / "moved", move), tmp_path / "refused")


# label -> change of the tensors, words of the error of `restore`, words of that of `load_model`
DAMAGES = {
    "one is missing": (
        lambda t: t.pop("model.layers.0.mlp_depth.query"),
        r"lacks depth tensors of its config \(model\.layers\.0\.mlp_depth\.query\)",
        r"other shapes .*depth_reads\.query: \[4, 16\], not \[5, 16\]",
    ),
    "one is too many": (
        lambda t: t.update({"model.layers.0.out_depth.query": torch.zeros(16)}),
        r"that the model of its config does not have \(model\.layers\.0\.out_depth\.query\)",
        r"other shapes .*depth_reads\.query: \[6, 16\], not \[5, 16\]",
    ),
    "one is too long": (
        lambda t: t.update({"model.layers.0.mlp_depth.query": torch.zeros(17)}),
        r"of other shapes than in its config \(model\.layers\.0\.mlp_depth\.query\)",
        "cannot be converted",
    ),
}


@pytest.mark.parametrize("change, of_restore, of_loading", DAMAGES.values(), ids=DAMAGES)
def test_damaged_ones_are_refused(change, of_restore, of_loading, tmp_path):
    folder = save_changed(tmp_path / "damaged", change)
    with pytest.raises(UserError, match=of_restore):
        restore(folder, tmp_path / "restored")
    with pytest.raises(UserError, match=of_loading):
        load_model(folder)
