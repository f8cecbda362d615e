"""PEFT with MoDA: gates and projections are trained whole, LoRA stays on the host, adapters of the stock host load."""

import copy

import pytest
import torch
import transformers
from moda_models import COMBINATIONS, moda_model
from model_checks import relative_max_error
from packaging import version
from safetensors.torch import load_file
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn

from hf_depthattn import depth_param_groups, lora_config
from hf_depthattn.integrations.peft import DEPTH_MODULES_PATTERN
from hf_depthattn.integrations.trainer import depth_parameter_names, is_depth_name

peft = pytest.importorskip("peft")

KV_MODULES = ["attn_depth_kv", "mlp_depth_kv"]
SITES = ["attn_depth", "mlp_depth", "out_depth"]
TARGETS = {"default": None, "names": ["q_proj", "k_proj"], "all-linear": "all-linear", "pattern": r".*\.[kv]_proj"}


def train_steps(model: nn.Module, ids, num_steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(depth_param_groups(model, lr=1e-2, weight_decay=0.1, depth_lr_factor=5.0))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module, ids):
    return model.eval()(input_ids=ids).logits


def adapted_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS)
def test_trained_adapter_saves_reloads_merges_and_disables(tmp_path, fields, dtype):
    base, ids = moda_model(**fields).to(dtype), random_ids(2, 11)
    fresh, base_logits = copy.deepcopy(base), logits(base, ids)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_steps(model, ids)
    kept = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    # The first site reads one source: nothing to learn there.
    assert {name for name in kept if ".0.attn_depth." not in name} == set()
    expected = logits(model, ids)
    assert relative_max_error(expected, base_logits) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base_logits)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    depth_names = {f"base_model.model.{name}" for name in depth_parameter_names(fresh)}
    assert sum(".attn_depth_kv.gate" in name for name in depth_names) == 2
    assert sum(".mlp_depth_kv." in name for name in depth_names) == 4
    assert depth_names <= saved.keys()
    assert all(saved[name].dtype == (dtype if ".mlp_depth_kv." in name else torch.float32) for name in depth_names)
    assert all(name in depth_names or ".lora_" in name for name in saved)
    # PEFT rounds LoRA matrices to the dtype of the model when it saves memory.
    for low_memory in (False, True) if dtype == torch.float32 else (False,):
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(reloaded, ids), expected)
    # transformers 5.17 leaves `modules_to_save` out here, on stock models too.
    if version.parse(transformers.__version__) >= version.parse("5.18") and dtype == torch.float32:
        integrated = copy.deepcopy(fresh)
        integrated.load_adapter(str(tmp_path))
        assert torch.equal(logits(integrated, ids), expected)

    model.double()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert type(merged) is type(fresh)
    assert relative_max_error(logits(merged, ids), expected) <= 1e-12


@pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS)
def test_merged_model_is_an_ordinary_checkpoint(tmp_path, fields):
    base, ids = moda_model(**fields), random_ids(2, 11)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    train_steps(model, ids)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), ids), logits(merged, ids))


@pytest.mark.parametrize("train_depth", [True, False])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora_never_targets_the_projections(targets, train_depth):
    """Their leaf names are those of the attention's own."""
    base = moda_model()
    model = peft.get_peft_model(base, lora_config(base, target_modules=targets, train_depth=train_depth))
    adapted = adapted_modules(model)
    per_layer = {"default": 7, "names": 2, "all-linear": 7, "pattern": 2}
    assert len(adapted) == 3 * next(n for label, n in per_layer.items() if TARGETS[label] == targets)
    assert not any(is_depth_name(name) for name in adapted)


def test_linear_layers_are_named_by_the_host_alone():
    """Phi3 has one fused `qkv_proj`: `k_proj` is a name of the projections only."""
    targets = lora_config(moda_model("phi3")).target_modules
    assert sorted(targets) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


# label -> fields, modules to save
MODULES_TO_SAVE = {
    "MoDA": ({}, KV_MODULES),
    "attention slots": ({"depth_kv": "attention"}, ["attn_depth_kv"]),
    "no gate": ({"depth_gate": None}, ["mlp_depth_kv"]),
    "no parameters": ({"depth_gate": None, "depth_kv": "attention"}, None),
    "with AttnRes": ({"connection": "attn_res"}, [*SITES, *KV_MODULES]),
    "attention slots with AttnRes": ({"connection": "attn_res", "depth_kv": "attention"}, [*SITES, "attn_depth_kv"]),
}


@pytest.mark.parametrize("fields, expected", MODULES_TO_SAVE.values(), ids=MODULES_TO_SAVE)
def test_modules_to_save_are_those_that_the_model_has(fields, expected):
    model = moda_model(**fields)
    assert lora_config(model).modules_to_save == expected
    assert lora_config(model, modules_to_save=["lm_head"]).modules_to_save == ["lm_head", *(expected or [])]
    peft.get_peft_model(model, lora_config(model))(input_ids=random_ids(1, 5))


def save_stock_adapter(stock: nn.Module, folder) -> nn.Module:
    """An adapter of a stock model, with targets whose names the projections have too; returns the merged model."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    trained = peft.get_peft_model(copy.deepcopy(stock), config)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    trained.save_pretrained(folder)
    return trained.merge_and_unload()


@pytest.mark.parametrize("how", ["PeftModel", "load_adapter", "low memory"])
@pytest.mark.parametrize("open_gates", [False, True], ids=["gates 0", "gates open"])
def test_stock_adapter_loads(tmp_path, how, open_gates):
    stock, ids = tiny_stock_model("llama"), random_ids(2, 11)
    merged = save_stock_adapter(stock, tmp_path)
    model = moda_model(stock, open_gates=open_gates)
    expected_model = moda_model(merged, open_gates=False)
    for name in depth_parameter_names(model):
        expected_model.get_parameter(name).data.copy_(model.get_parameter(name))
    if how == "load_adapter":
        model.load_adapter(str(tmp_path))
    elif how == "PeftModel":
        model = peft.PeftModel.from_pretrained(model, tmp_path)
    else:
        # Without the pattern, PEFT leaves LoRA matrices of the projections without values.
        config = peft.PeftConfig.from_pretrained(tmp_path)
        config.exclude_modules = DEPTH_MODULES_PATTERN
        model = peft.PeftModel.from_pretrained(model, tmp_path, config=config, low_cpu_mem_usage=True)
        assert not any(is_depth_name(name) for name in adapted_modules(model))
    assert relative_max_error(logits(model, ids), logits(expected_model, ids)) <= 1e-5
    assert open_gates or relative_max_error(logits(model, ids), logits(merged, ids)) <= 1e-5
