"""Quantised models: depth modules stay as they are, LoRA trains beside them, and what is saved loads again."""

import importlib.util

import pytest
import torch
from model_checks import depth_model, randomise_depth, relative_max_error
from tiny_hosts import random_ids, tiny_stock_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers.utils import is_optimum_quanto_available

from hf_depthattn import DepthAttnForCausalLM, lora_config, retrofit
from hf_depthattn.integrations.trainer import is_depth_name

COMBINATIONS = {
    "AttnRes": {"num_blocks": 2, "query": "input"},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "both": {"num_blocks": 2, "query": "input", "depth_kv": "attention+mlp", "depth_gate": "head"},
}


def bitsandbytes_4bit(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )


def bitsandbytes_8bit(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def torchao_int8(**options):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), **options)


def quanto_int8(**options):
    if not is_optimum_quanto_available():
        pytest.skip("needs optimum-quanto")
    return QuantoConfig(weights="int8", **options)


# quantiser -> (config, its option for modules that stay as they are)
QUANTISERS = {
    "bitsandbytes 4 bit": (bitsandbytes_4bit, "llm_int8_skip_modules"),
    "bitsandbytes 8 bit": (bitsandbytes_8bit, "llm_int8_skip_modules"),
    "torchao int8": (torchao_int8, "modules_to_not_convert"),
    "quanto int8": (quanto_int8, "modules_to_not_convert"),
}
# Every quantiser on both methods, and each method alone on one.
PAIRS = [("both", quantiser) for quantiser in QUANTISERS] + [
    ("AttnRes", "torchao int8"),
    ("MoDA", "bitsandbytes 4 bit"),
]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="quantisers need accelerate"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """combination -> folder of a model, whose layers are large enough for blocks of 64 weights."""
    torch.manual_seed(0)
    folders = {}
    for name, fields in COMBINATIONS.items():
        model = depth_model(tiny_stock_model("llama", hidden_size=64, intermediate_size=128, head_dim=16), **fields)
        randomise_depth(model)
        folders[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def quantised(folder, quantiser: str, dtype: torch.dtype = torch.float32, **options) -> DepthAttnForCausalLM:
    config, _ = QUANTISERS[quantiser]
    return DepthAttnForCausalLM.from_pretrained(folder, quantization_config=config(**options), dtype=dtype).eval()


def is_quantised(module: torch.nn.Module) -> bool:
    return type(module) is not torch.nn.Linear or type(module.weight.data) is not torch.Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("combination", "quantiser"), PAIRS)
def test_depth_modules_are_not_quantised(saved, combination, quantiser, dtype):
    """With a list of the user's own too."""
    options = {QUANTISERS[quantiser][1]: ["lm_head"]} if dtype == torch.float16 else {}
    model = quantised(saved[combination], quantiser, dtype, **options)
    for name, parameter in model.named_parameters():
        if is_depth_name(name):
            assert type(parameter) is torch.nn.Parameter, name
            assert parameter.dtype == (dtype if "mlp_depth_kv" in name else torch.float32), name
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    of_host = {name for name in linear if not is_depth_name(name) and name != "lm_head"}
    assert len(of_host) == 7 * 3
    assert {name for name, module in linear.items() if is_quantised(module)} == of_host


@pytest.mark.parametrize(("combination", "quantiser"), PAIRS)
def test_lora_on_a_quantised_model_trains_and_reloads(saved, combination, quantiser, tmp_path):
    peft = pytest.importorskip("peft")
    model = quantised(saved[combination], quantiser)
    model = peft.get_peft_model(model, lora_config(model, r=4)).train()
    ids = random_ids(2, 9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad), combination
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    trained = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(quantised(saved[combination], quantiser), tmp_path).eval()
    assert torch.equal(reloaded(ids).logits, trained)
    if quantiser == "quanto int8":
        return  # PEFT's merge leaves quanto's weights as they were, on stock models too
    before = quantised(saved[combination], quantiser)(ids).logits
    merged = reloaded.merge_and_unload()
    assert not any(hasattr(module, "lora_A") or hasattr(module, "modules_to_save") for module in merged.modules())
    # The merged weights are rounded again; with 4 bits that is as much as a few steps of training.
    if quantiser != "bitsandbytes 4 bit":
        assert relative_max_error(merged(ids).logits, trained) < 0.5 * relative_max_error(before, trained)


@pytest.mark.parametrize("combination", ["AttnRes", "both"])
def test_preparation_for_training_with_few_bits(saved, combination):
    """PEFT casts what is not quantised to float32 and switches checkpointing on, in its reentrant form."""
    peft = pytest.importorskip("peft")
    model = quantised(saved[combination], "bitsandbytes 4 bit", torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, lora_config(model, r=4)).train()
    ids = random_ids(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize(("combination", "quantiser"), [pair for pair in PAIRS if pair[1] != "quanto int8"])
def test_a_saved_quantised_model_loads(saved, combination, quantiser, tmp_path):
    """Quanto's are not saved by transformers at all."""
    model, ids = quantised(saved[combination], quantiser), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded, info = DepthAttnForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantised_retrofit_is_the_quantised_host(quantiser, tmp_path):
    stock = tiny_stock_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    stock.save_pretrained(tmp_path / "stock")
    retrofit(tmp_path / "stock", tmp_path / "retrofit", num_blocks=2, depth_kv="attention+mlp", depth_gate="head")
    config, _ = QUANTISERS[quantiser]
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", quantization_config=config(), dtype=torch.float32)
    ids = random_ids(2, 9)
    model, expected = quantised(tmp_path / "retrofit", quantiser), host.eval()(ids).logits
    assert relative_max_error(expected, stock(ids).logits) > 1e-3
    # Activations in 8 bits are rounded differently where reads differ in their last bits.
    assert relative_max_error(model(ids).logits, expected) < (0.02 if quantiser == "bitsandbytes 8 bit" else 1e-4)
    arguments = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), host.generate(ids, **arguments))
