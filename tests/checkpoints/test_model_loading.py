"""`load_model`: a checkpoint is loaded completely, or refused in one line that names its first wrong tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from damaged_checkpoints import DAMAGE, DAMAGED_FILES, PROJECTION, edit_tensors
from model_checks import depth_model, randomise_depth
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, save_stock
from tiny_hosts import VOCAB_SIZE, tiny_stock_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_depthattn.checkpoints.loading_info import check_loading_info
from hf_depthattn.checkpoints.model_loading import (
    check_token_ids,
    load_config,
    load_model,
    load_tokenizer,
)
from hf_depthattn.errors import UserError


@pytest.mark.parametrize("label", DAMAGE)
def test_an_incomplete_or_foreign_checkpoint_is_refused(tmp_path, label):
    edit, fields, message = DAMAGE[label]
    folder = save_stock(tmp_path / "stock", tokenizer=False)
    load_model(folder)
    edit_tensors(folder, edit)
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, name="as given")
    assert str(caught.value).startswith("as given: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["query", "gate"])
def test_a_depth_checkpoint_without_a_depth_tensor_is_refused(tmp_path, missing):
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", depth_kv="attention", depth_gate="head")
    model.save_pretrained(tmp_path)
    load_model(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(next(key for key in sorted(t) if key.endswith(f".{missing}"))))
    with pytest.raises(UserError, match=rf"lacks tensors of the model \(\S+\.{missing}\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_queries_in_files_without_prefix_are_not_ignored(tmp_path, auto_class):
    model = depth_model(tiny_stock_model("llama"), connection="attn_res", read_scale="sum")
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({key.removeprefix("model."): t.pop(key) for key in list(t)}))
    load_model(tmp_path, model_class=auto_class)
    edit_config(tmp_path, connection="residual", read_scale="mean")
    with pytest.raises(UserError, match=r"does not have \((?:model\.)?depth_reads\.key_norm and 1 more\)"):
        load_model(tmp_path, model_class=auto_class)


def test_tensors_of_other_heads_and_modalities_do_not_matter(tmp_path):
    folder = save_stock(tmp_path / "stock", tokenizer=False)
    expected = load_model(folder).state_dict()
    edit_config(folder, num_nextn_predict_layers=1)
    edit_tensors(
        folder,
        lambda t: t.update(
            {
                "score.weight": torch.ones(2, 32),
                "v_head.summary.weight": torch.ones(1, 32),
                "model.vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(3),
                "mtp.layers.0.mlp.up_proj.weight": torch.ones(3),
                # The layer behind the last is one that predicts further tokens, says the config.
                "model.layers.3.eh_proj.weight": torch.ones(3),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    loaded = load_model(folder).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


#: Model type -> sizes, and the causal mask that older checkpoints of it hold.
MASKS = {
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}, "transformer.h.0.attn.bias"),
    "gpt_neox": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40},
        "gpt_neox.layers.0.attention.bias",
    ),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "transformer.h.0.attn.attention.bias",
    ),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}, "transformer.h.0.attn.bias"),
    "codegen": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4},
        "transformer.h.0.attn.causal_mask",
    ),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
@pytest.mark.parametrize("model_type", MASKS)
def test_causal_masks_in_older_checkpoints_do_not_matter(tmp_path, model_type, dtype):
    sizes, mask = MASKS[model_type]
    config = AutoConfig.for_model(model_type, vocab_size=40, bos_token_id=1, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected = load_model(tmp_path).state_dict()
    edit_tensors(tmp_path, lambda t: t.update({mask: torch.ones(1, 1, 8, 8).tril().to(dtype)}))
    loaded = load_model(tmp_path).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_a_tied_checkpoint_without_a_head_is_complete(tmp_path):
    folder = save_stock(tmp_path / "stock", tokenizer=False, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("label", DAMAGED_FILES)
def test_damaged_files_are_one_line(tmp_path, label):
    folder = save_stock(tmp_path / "stock", tokenizer=False)
    DAMAGED_FILES[label](folder)
    with pytest.raises(UserError, match=r"stock") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_pickles_are_not_read(tmp_path):
    folder = save_stock(tmp_path / "stock", tokenizer=False)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"only pickle weights \(pytorch_model.bin\)"):
        load_model(folder)


def test_a_device_that_cannot_compute_is_refused(tmp_path):
    with pytest.raises(UserError, match="device: 'meta' cannot run a model"):
        load_model(tmp_path, device="meta")


def test_token_ids_beyond_the_vocabulary_are_refused():
    model = tiny_stock_model("llama")
    check_token_ids([0, VOCAB_SIZE - 1], model, "m")
    for ids in ([1, VOCAB_SIZE], torch.tensor([[VOCAB_SIZE, 2]])):
        with pytest.raises(UserError, match=f"m: its tokenizer returns token id {VOCAB_SIZE}, but the model has only"):
            check_token_ids(ids, model, "m")


def test_a_tokenizer_or_config_that_is_missing_or_damaged_is_one_line(tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    for load, folder, problem in (
        (load_tokenizer, tmp_path, "has no tokenizer"),
        (load_tokenizer, tmp_path / "damaged", "its tokenizer cannot be loaded: "),
        (load_config, tmp_path, "its config cannot be used: "),
    ):
        with pytest.raises(UserError, match=f"m: {problem}") as caught:
            load(folder, name="m")
        assert "\n" not in str(caught.value)


def test_scales_that_quanto_adds_are_not_missing():
    # A plain checkpoint whose config asks for quanto is quantised while it is loaded.
    model = tiny_stock_model("llama")
    info = {"missing_keys": [f"{PROJECTION}.input_scale"], "unexpected_keys": [], "mismatched_keys": []}
    with pytest.raises(UserError, match="input_scale"):
        check_loading_info(info, model, "m")
    from transformers import QuantoConfig

    model.config.quantization_config = QuantoConfig(weights="int8")
    check_loading_info(info, model, "m")


@pytest.mark.parametrize("quantiser", ["bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao", "quanto"])
def test_checkpoints_that_transformers_reads_quantised_are_loaded(tmp_path, quantiser):
    import transformers

    package = {"torchao": "torchao", "quanto": "optimum.quanto"}.get(quantiser, "bitsandbytes")
    pytest.importorskip(package)
    folder = save_stock(tmp_path / "stock", tokenizer=False)
    if quantiser == "quanto":
        edit_config(folder, quantization_config={"quant_method": "quanto", "weights": "int8"})
    else:
        if quantiser == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        else:
            config = transformers.BitsAndBytesConfig(load_in_4bit="4" in quantiser, load_in_8bit="8" in quantiser)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        shutil.rmtree(folder)
        model.save_pretrained(folder)
        assert "quantization_config" in json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(load_model(folder)(ids).logits, expected)


# --- adapters ---

peft = pytest.importorskip("peft")


def save_adapter(model, folder: Path) -> Path:
    """An adapter with LoRA on the host and the depth modules trained whole."""
    from hf_depthattn import lora_config

    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, lora_config(model, r=4))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    stock = tiny_stock_model("llama")
    kinds = {
        "AttnRes": {"connection": "attn_res"},
        "AttnRes and MoDA": {"connection": "attn_res", "depth_kv": "attention+mlp", "depth_gate": "head"},
    }
    stock.save_pretrained(folder / "stock")
    for kind, fields in kinds.items():
        model = depth_model(stock, **fields)
        randomise_depth(model)
        model.save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("stock", *kinds)}


@pytest.mark.parametrize("base", ["stock", "AttnRes"])
def test_an_adapter_with_tensors_that_have_no_place_is_refused(tmp_path, bases, base):
    adapter = save_adapter(load_model(bases["AttnRes and MoDA"]), tmp_path / "adapter")
    message = r"--peft \S+: \w+ does not have \d+ of its tensors \(first \S+\); give the base model"
    with pytest.raises(UserError, match=message) as caught:
        load_model(bases[base], adapter=adapter)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_tensors_for_its_layers_is_refused(tmp_path, bases):
    adapter = save_adapter(load_model(bases["AttnRes"]), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    gone = next(key for key in sorted(tensors) if "lora_B" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"--peft \S+: lacks 1 tensors of its layers \(first \S+lora_B"):
        load_model(bases["AttnRes"], adapter=adapter)


@pytest.mark.parametrize("base", ["stock", "AttnRes", "AttnRes and MoDA"])
def test_an_adapter_of_the_stock_host_loads_everywhere(tmp_path, bases, base):
    # Among its targets is a name that MoDA's projections have too.
    model = peft.get_peft_model(load_model(bases["stock"]), peft.LoraConfig(r=4, target_modules=["k_proj", "up_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        adapted, plain = load_model(bases[base], adapter=tmp_path), load_model(bases[base])
        assert not torch.allclose(adapted(ids).logits, plain(ids).logits)
        if base == "stock":
            assert torch.equal(adapted(ids).logits, model.eval()(ids).logits)


def test_an_adapter_on_its_own_base_gives_the_trained_model(tmp_path, bases):
    base = bases["AttnRes and MoDA"]
    trained = load_model(base)
    adapter = save_adapter(trained, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(load_model(base, adapter=adapter)(ids).logits, trained(ids).logits)


def test_damaged_adapters_are_one_line(tmp_path, bases):
    adapter = save_adapter(load_model(bases["AttnRes"]), tmp_path / "adapter")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, fields = weights.read_bytes(), config.read_text()
    for damage, message in (
        (lambda: weights.write_bytes(whole[:-9]), "cut short"),
        (lambda: config.write_text("{"), "not valid JSON"),
        (lambda: config.write_text('{"peft_type": "NOTHING"}'), "does not fit the model"),
        (lambda: weights.rename(adapter / "adapter_model.bin"), "no adapter_model.safetensors in it"),
        (lambda: config.unlink(), "no adapter_config.json in it"),
    ):
        damage()
        with pytest.raises(UserError, match=message) as caught:
            load_model(bases["AttnRes"], adapter=adapter)
        assert "\n" not in str(caught.value)
        weights.write_bytes(whole)
        config.write_text(fields)


def test_shapes_of_another_base_are_one_line(tmp_path, bases):
    wide = save_stock(tmp_path / "wide", tokenizer=False, hidden_size=48)
    adapter = save_adapter(load_model(bases["AttnRes"]), tmp_path / "adapter")
    adapter_stock = tmp_path / "adapter of the stock model"
    peft.get_peft_model(load_model(bases["stock"]), peft.LoraConfig(r=4, target_modules=["up_proj"])).save_pretrained(
        adapter_stock
    )
    for folder in (adapter, adapter_stock):
        with pytest.raises(UserError, match="--peft ") as caught:
            load_model(wide, adapter=folder)
        assert "\n" not in str(caught.value)


def test_a_config_with_which_the_model_cannot_run_is_refused(tmp_path):
    folder = save_stock(tmp_path / "moe", "qwen3_moe", tokenizer=False)
    edit_config(folder, num_experts_per_tok=99)
    with pytest.raises(UserError, match=r"its model cannot run: .*out of range"):
        load_model(folder)


def test_sizes_that_would_fill_the_memory_are_refused_before_anything_is_built(tmp_path):
    """The weights stay small: what a larger config asks for would be started at random, in memory."""
    folder = save_stock(tmp_path / "llama", tokenizer=False)
    for fields, message in (
        ({"vocab_size": 2**33}, "other shapes than in its config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 in its config is more than any model has"),
        ({"num_hidden_layers": 90_000}, "its config has 90000 layers, but its weights have 3"),
        ({"num_labels": 10**9}, "num_labels: 1000000000 in its config is more than any model has"),
    ):
        config = (folder / "config.json").read_text()
        edit_config(folder, **fields)
        with pytest.raises(UserError, match=message):
            load_model(folder)
        (folder / "config.json").write_text(config)
