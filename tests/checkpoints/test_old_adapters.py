"""Adapters of the old layout: PEFT would load them without their queries, so they are refused until converted."""

import json
import shutil

import pytest
import torch
from model_checks import LOADS_MODULES_TO_SAVE
from peft_models import logits, peft
from repository import DATA
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_depthattn.checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_depthattn.checkpoints.adapter_loading import merge_adapter
from hf_depthattn.checkpoints.model_loading import load_model
from hf_depthattn.checkpoints.old_adapters import convert_adapter
from hf_depthattn.errors import UserError

FOLDER = DATA / "saved_with_queries_in_sites"
ADAPTER = FOLDER / "adapter_of_causal_lm"
IDS = torch.arange(3, 12)[None]


def base_model():
    return AutoModelForCausalLM.from_pretrained(FOLDER / "causal_lm")


def assert_computes(model, name: str) -> None:
    expected = torch.tensor(json.loads((FOLDER / "expected.json").read_text())[name])
    found = logits(model, IDS).flatten()[-40:]
    assert torch.allclose(found, expected, atol=2e-6), (found - expected).abs().max()


@pytest.mark.parametrize("how", ["PeftModel", "low memory", "second adapter", "load_adapter"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_adapter_is_refused_with_the_way_to_convert_it(how, tmp_path):
    convert_adapter(ADAPTER, tmp_path / "new")
    load = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(base_model(), ADAPTER),
        "low memory": lambda: peft.PeftModel.from_pretrained(base_model(), ADAPTER, low_cpu_mem_usage=True),
        "second adapter": lambda: peft.PeftModel.from_pretrained(base_model(), tmp_path / "new").load_adapter(
            ADAPTER, "second"
        ),
        "load_adapter": lambda: base_model().load_adapter(str(ADAPTER)),
    }[how]
    with pytest.raises(ValueError, match=r"attn_depth\.key_norm\.weight: .*old_adapters\.convert_adapter\(FOLDER"):
        load()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_converted_adapter_computes_the_same_and_is_a_usual_one(tmp_path):
    convert_adapter(ADAPTER, tmp_path / "new")
    config = json.loads((tmp_path / "new" / ADAPTER_CONFIG).read_text())
    assert config["modules_to_save"] == ["depth_reads", "attn_depth_kv", "mlp_depth_kv"]
    for low_memory in (False, True):
        model = peft.PeftModel.from_pretrained(base_model(), tmp_path / "new", low_cpu_mem_usage=low_memory)
        assert_computes(model, "adapter_of_causal_lm")
    with model.disable_adapter():
        assert_computes(model, "causal_lm")
    model.save_pretrained(tmp_path / "again")
    tensors = [load_file(tmp_path / name / ADAPTER_WEIGHTS) for name in ("new", "again")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    if LOADS_MODULES_TO_SAVE:
        model = base_model()
        model.load_adapter(str(tmp_path / "new"))
        assert_computes(model, "adapter_of_causal_lm")


def test_the_commands_convert_an_old_adapter_themselves():
    before = (ADAPTER / ADAPTER_WEIGHTS).read_bytes()
    model = load_model(FOLDER / "causal_lm", adapter=ADAPTER)
    assert_computes(model, "adapter_of_causal_lm")
    assert_computes(merge_adapter(model, ADAPTER), "adapter_of_causal_lm")
    assert (ADAPTER / ADAPTER_WEIGHTS).read_bytes() == before


def test_other_tensors_of_sites_stay_there(tmp_path):
    """The projections of input-dependent queries, and other files."""
    folder = shutil.copytree(ADAPTER, tmp_path / "old")
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    projection = "base_model.model.model.layers.1.mlp_depth.query_proj.weight"
    save_file(tensors | {projection: torch.ones(16, 16)}, folder / ADAPTER_WEIGHTS)
    (folder / "notes.txt").write_text("kept")
    convert_adapter(folder, tmp_path / "new")
    assert projection in load_file(tmp_path / "new" / ADAPTER_WEIGHTS)
    config = json.loads((tmp_path / "new" / ADAPTER_CONFIG).read_text())
    assert config["modules_to_save"] == ["depth_reads", "mlp_depth", "attn_depth_kv", "mlp_depth_kv"]
    assert (tmp_path / "new" / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("leaf", ["0.attn_depth", "1.mlp_depth", "1.out_depth"])
def test_an_adapter_of_some_sites_is_not_converted(leaf, tmp_path):
    folder = shutil.copytree(ADAPTER, tmp_path / "old")
    tensors = {name: t for name, t in load_file(folder / ADAPTER_WEIGHTS).items() if f"{leaf}." not in name}
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="has 4 sites, which are not all sites of a model; merge it"):
        convert_adapter(folder, tmp_path / "new")
    with pytest.raises(UserError, match=r"--peft .*has 4 sites"):
        load_model(FOLDER / "causal_lm", adapter=folder)


def test_wrong_folders_are_refused(tmp_path):
    convert_adapter(ADAPTER, tmp_path / "new")
    for source, target, words in (
        (tmp_path / "new", "newer", "needs no conversion"),
        (ADAPTER, "new", "exists already"),
        (FOLDER, "newer", "has no adapter_config.json or no adapter_model.safetensors"),
    ):
        with pytest.raises(UserError, match=words):
            convert_adapter(source, tmp_path / target)
