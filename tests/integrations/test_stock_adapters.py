"""PEFT adapters of the stock host load into retrofitted models, and one without depth modules goes back to it."""

import copy

import pytest
import torch
from moda_models import moda_model
from model_checks import relative_max_error
from peft_models import adapted_modules, logits, peft, randomise_adapter, zero_query_model
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn

from hf_depthattn import DepthAttnConfig, DepthAttnModel, lora_config
from hf_depthattn.integrations.peft import DEPTH_MODULES_PATTERN
from hf_depthattn.integrations.trainer import depth_parameter_names, is_depth_name

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STOCK_ADAPTERS = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "one-layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "full-name": ("llama", {"target_modules": ["model.layers.2.self_attn.q_proj"]}),
    "embeddings-and-head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "moe-attention": ("qwen3_moe", {"target_modules": ["q_proj", "o_proj"]}),
    "moe-experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "moe-expert-names": ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
}


def save_stock_adapter(stock, folder, ids, **fields):
    """Adapter of a stock model, and the logits with it."""
    model = peft.get_peft_model(copy.deepcopy(stock), peft.LoraConfig(r=4, **fields))
    randomise_adapter(model)
    model.save_pretrained(folder)
    return logits(model, ids)


@pytest.mark.parametrize("how", ["PeftModel", "load_adapter"])
@pytest.mark.parametrize(("host", "fields"), STOCK_ADAPTERS.values(), ids=STOCK_ADAPTERS)
def test_stock_adapter_loads(tmp_path, host, fields, how):
    stock, ids = tiny_stock_model(host), random_ids(2, 11)
    expected = save_stock_adapter(stock, tmp_path, ids, **fields)
    model = zero_query_model(stock)
    if how == "PeftModel":
        model = peft.PeftModel.from_pretrained(model, tmp_path)
    else:
        info = model.load_adapter(str(tmp_path))
        assert not info.missing_keys
        assert not info.unexpected_keys
    assert relative_max_error(logits(model, ids), expected) <= 1e-5
    assert relative_max_error(logits(stock, ids), expected) > 1e-3


@pytest.mark.parametrize("method", ["lora-and-head", "ia3"])
def test_stock_adapter_of_other_kinds_loads(tmp_path, method):
    """PEFT converts the keys of LoRA matrices only; for others it asks the model for a key mapping."""
    stock, ids = tiny_stock_model("llama"), random_ids(2, 11)
    if method == "ia3":
        config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    else:
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = peft.get_peft_model(copy.deepcopy(stock), config)
    randomise_adapter(trained)
    trained.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(zero_query_model(stock), tmp_path)
    assert relative_max_error(logits(model, ids), logits(trained, ids)) <= 1e-5


def test_stock_adapter_loads_on_the_base_model(tmp_path):
    stock, ids = tiny_stock_model("llama"), random_ids(2, 11)
    trained = peft.get_peft_model(copy.deepcopy(stock.model), peft.LoraConfig(target_modules=["q_proj"]))
    randomise_adapter(trained)
    trained.save_pretrained(tmp_path)
    base = DepthAttnModel(DepthAttnConfig.attn_res(stock.config, read_scale="sum"))
    base.load_state_dict(stock.model.state_dict(), strict=False)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = trained.eval()(input_ids=ids).last_hidden_state
        assert relative_max_error(model(input_ids=ids).last_hidden_state, expected) <= 1e-5


def test_adapter_without_depth_goes_back_to_the_stock_host(tmp_path):
    stock, ids = tiny_stock_model("llama"), random_ids(2, 11)
    base = zero_query_model(stock)
    model = peft.get_peft_model(base, lora_config(base, train_depth=False))
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no modules were excluded"):
        on_stock = peft.PeftModel.from_pretrained(stock, tmp_path)
    assert relative_max_error(logits(on_stock, ids), logits(model, ids)) <= 1e-5


def save_merged_adapter(stock: nn.Module, folder) -> nn.Module:
    """An adapter of a stock model, with targets whose names the projections have too; returns the merged model."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    trained = peft.get_peft_model(copy.deepcopy(stock), config)
    randomise_adapter(trained)
    trained.save_pretrained(folder)
    return trained.merge_and_unload()


@pytest.mark.parametrize("how", ["PeftModel", "load_adapter", "low memory"])
@pytest.mark.parametrize("open_gates", [False, True], ids=["gates 0", "gates open"])
def test_stock_adapter_loads_beside_projections_of_the_same_names(tmp_path, how, open_gates):
    stock, ids = tiny_stock_model("llama"), random_ids(2, 11)
    merged = save_merged_adapter(stock, tmp_path)
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
