"""The example of fine-tuning runs on a checkpoint, with and without LoRA."""

import re
import runpy
import sys
from inspect import signature

import pytest
from model_checks import depth_model
from repository import ROOT
from tiny_hosts import tiny_stock_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.pretraining.results import read_results
from hf_depthattn import depth_param_groups

EXAMPLE = ROOT / "examples" / "finetune_trainer.py"


@pytest.mark.parametrize("moda", [False, True], ids=["AttnRes", "MoDA too"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_example_finetunes_a_checkpoint(tmp_path, monkeypatch, capsys, lora, moda):
    if lora:
        pytest.importorskip("peft")
    assert len(EXAMPLE.read_text().splitlines()) < 80
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "checkpoint")
    stock = tiny_stock_model("llama", vocab_size=len(alphabet))
    fields = {"depth_kv": "attention+mlp", "depth_gate": "head"} if moda else {}
    model = depth_model(stock, sublayers_per_block=2, read_scale="sum", **fields)
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text(EXAMPLE.read_text())

    arguments = ["checkpoint", "text.txt", "out", "--steps=4", "--block-size=32", "--learning-rate=0.01"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, *(["--lora-rank=2"] if lora else [])])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = (float(word) for word in capsys.readouterr().out.split() if word.replace(".", "").isdigit())
    assert after < before
    if not lora:
        model = AutoModelForCausalLM.from_pretrained("out")
        assert model.get_decoder().depth_reads.query[-1].any()
        assert not moda or model.get_decoder().layers[-1].attn_depth_kv.gate.all()


def test_the_rate_of_depth_parameters_is_the_one_that_the_study_found_for_attn_res():
    default = signature(depth_param_groups).parameters["depth_lr_factor"].default
    for name in ("finetune_trainer", "demo_retrofit", "pretrain"):
        script = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(r'"--depth-lr-factor", type=float, default=([\d.]+)', script)[1] == str(default), name
    tried = {
        run.depth_lr_factor: result.loss
        for run, result in read_results().items()
        if (run.arm, run.corpus, run.tokens, run.seed) == ("retrofit_block_attn_res", "stdlib", 100_000, 0)
    }
    assert len(tried) >= 3 and min(tried, key=tried.get) == default
