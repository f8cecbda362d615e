"""A model in memory as the source of a retrofit."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, load, logits, save_stock
from tiny_hosts import ALL_HOSTS, random_ids, tiny_stock_model
from transformers import AutoModelForCausalLM, Mxfp4Config

from hf_depthattn import retrofit
from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE
from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify.verify import verify


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_model_in_memory_gives_the_checkpoint_of_its_folder(model_type, tmp_path):
    stock = save_stock(tmp_path / "stock", model_type, tokenizer=False)
    model = load(stock)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    report = retrofit(model, tmp_path / "new" / "out", num_blocks=2)
    ids = random_ids(2, 9)
    assert torch.allclose(logits(load(tmp_path / "new" / "out"), ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert report.bytes_linked == 0 and report.bytes_written > sum(p.nbytes for p in model.parameters())
    assert report.source == f"{type(model).__name__} in memory, from {stock}" and str(report)
    # What was saved on the way is gone, and no file refers to it.
    assert os.listdir(tmp_path / "new") == ["out"]
    assert str(tmp_path) not in (tmp_path / "new" / "out" / "config.json").read_text()
    model.save_pretrained(tmp_path / "host")
    assert verify(tmp_path / "host", tmp_path / "new" / "out", require_tokenizer=False, max_new_tokens=2).ok


@pytest.mark.skipif("gpt_oss" not in ALL_HOSTS, reason="transformers has no gpt_oss")
def test_a_model_that_was_dequantised_while_loading(tmp_path):
    """GPT-OSS is published with packed experts: two values of 4 bits in a byte, and an exponent for 32 of them."""
    folder = save_stock(tmp_path / "packed", "gpt_oss", tokenizer=False, intermediate_size=64)
    tensors = load_file(folder / SINGLE_FILE)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        num_experts, num_columns, num_rows = tensors.pop(name).shape
        shape = num_experts, num_rows, num_columns // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    with pytest.raises(UserError, match="is quantised"):
        retrofit(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    # transformers 5.17 dequantises to bfloat16, whatever the dtype.
    model = model.float().eval()
    retrofit(model, tmp_path / "out", num_blocks=2)
    ids = random_ids(2, 9)
    assert torch.allclose(logits(load(tmp_path / "out"), ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_other_models_and_bad_arguments_are_refused(tmp_path):
    model = tiny_stock_model("llama")
    with pytest.raises(UserError, match=r"source: is a Linear; give a folder, a Hub id or a model"):
        retrofit(torch.nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(UserError, match="not for a model in memory"):
        retrofit(model, tmp_path / "out", revision="main")
    with pytest.raises(UserError, match=r"^LlamaForCausalLM in memory: has no tokenizer"):
        retrofit(model, tmp_path / "out", require_tokenizer=True)
    with pytest.raises(UserError, match="num_blocks"):
        retrofit(model, tmp_path / "elsewhere" / "out", num_blocks=99)
    retrofit(model, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        retrofit(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"in memory, from .*already a depth attention checkpoint"):
        retrofit(load(tmp_path / "out"), tmp_path / "again")
    assert os.listdir(tmp_path) == ["out"]


def test_a_model_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_stock_model("llama")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(UserError, match=r"LlamaForCausalLM in memory: cannot be saved: .*No space left"):
        retrofit(model, tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []
