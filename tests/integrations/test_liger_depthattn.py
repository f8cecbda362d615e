"""`use_liger_kernel=True`: Liger replaces in our models what it replaces in their host, or says that it does not.

Its kernels need a GPU; here it is what they are put into that is compared.
"""

import importlib
import sys

import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from hf_depthattn import DepthAttnConfig, DepthAttnForSequenceClassification, liger_depthattn
from hf_depthattn.host_attention import KeyRotation, host_attention

needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
HOSTS = ("llama", "qwen3", "gemma2", "olmo2", "mixtral", "phi3")
BOTH = {"num_blocks": 2, "depth_kv": "attention+mlp"}


@pytest.fixture
def unpatched():
    """Puts back what Liger replaces in the modules of transformers and torch."""
    modules = [importlib.import_module(f"transformers.models.{host}.modeling_{host}") for host in HOSTS]
    before = [(module, dict(vars(module))) for module in modules]
    cross_entropy = torch.nn.functional.cross_entropy
    yield
    torch.nn.functional.cross_entropy = cross_entropy
    for module, names in before:
        vars(module).update(names)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    # Remote code that another test has loaded may have registered its own function.
    liger_depthattn.register_with_liger()
    monkeypatch.setattr(liger_depthattn.logger, "warning", messages.append)
    return messages


def patched_modules(model) -> dict[str, str]:
    """Modules with a forward of their own -> where it comes from."""
    return {
        name: module.forward.__func__.__module__ for name, module in model.named_modules() if "forward" in vars(module)
    }


@needs_liger
@pytest.mark.parametrize("host", HOSTS)
def test_the_same_modules_are_replaced_as_in_the_stock_model(host, unpatched):
    stock = tiny_stock_model(host)
    model = depth_model(stock, **BOTH)
    apply_liger_kernel(stock, None)
    apply_liger_kernel(model, None)
    assert len(patched_modules(stock)) > 7
    assert patched_modules(model) == patched_modules(stock)


@needs_liger
def test_options_reach_the_function_of_the_host_and_logits_stay(unpatched):
    model = depth_model(tiny_stock_model("llama"), **BOTH)
    randomise_depth(model)
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
        # What runs without a GPU: the forward that forms no logits when it is given labels.
        apply_liger_kernel(model, {"rope": False, "rms_norm": False, "swiglu": False})
        assert list(patched_modules(model)) == [""]
        assert torch.equal(model(ids).logits, expected)


@needs_liger
def test_heads_keep_their_forward(unpatched):
    model = DepthAttnForSequenceClassification(DepthAttnConfig.attn_res(tiny_host_config("llama"), **BOTH))
    apply_liger_kernel(model, None)
    assert "" not in patched_modules(model) and "model.norm" in patched_modules(model)


@needs_liger
def test_trainer_says_so_when_liger_has_nothing_for_the_host(tmp_path, warnings):
    model = depth_model(tiny_stock_model("starcoder2"), **BOTH)
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    args = TrainingArguments(
        tmp_path, max_steps=1, use_liger_kernel=True, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, args, train_dataset=data).train()
    assert len(warnings) == 1 and "'starcoder2'" in warnings[0]


def test_the_entry_waits_for_the_import_of_liger(tmp_path, monkeypatch):
    (tmp_path / "stand_in_for_liger.py").write_text(
        "MODEL_TYPE_TO_APPLY_LIGER_FN = {'llama': lambda model, rope: None}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(liger_depthattn, "_LIGER_MODULE", "stand_in_for_liger")
    finders = len(sys.meta_path)
    liger_depthattn.register_with_liger()
    liger_depthattn.register_with_liger()
    assert "stand_in_for_liger" not in sys.modules and len(sys.meta_path) == finders + 1
    module = importlib.import_module("stand_in_for_liger")
    monkeypatch.delitem(sys.modules, "stand_in_for_liger")
    assert "depthattn" in module.MODEL_TYPE_TO_APPLY_LIGER_FN and len(sys.meta_path) == finders


def test_a_rotation_that_works_in_place_gives_the_same_keys(monkeypatch):
    """As Liger's does, and a model that is built after Liger has patched the host's module finds it."""
    model = tiny_stock_model("llama")
    attention, modeling = model.model.layers[0].self_attn, sys.modules[type(model).__module__]
    key = torch.randn(2, 2, 5, 8)
    positions = model.model.rotary_emb(key, torch.arange(5)[None])
    expected = KeyRotation(host_attention("llama"), attention, model.config)(key, positions)
    rotated = modeling.apply_rotary_pos_emb

    def in_place(query, key, cos, sin):
        query.copy_(rotated(query, query, cos, sin)[0])
        key.copy_(rotated(key, key, cos, sin)[1])
        return query, key

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", in_place)
    before = key.clone()
    assert torch.equal(KeyRotation(host_attention("llama"), attention, model.config)(key, positions), expected)
    assert torch.equal(key, before)
