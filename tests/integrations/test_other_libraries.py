"""Libraries that go by names: adapters, patterns for target modules, tools that read checkpoints tensor by tensor."""

import shutil
import warnings

import pytest
import torch
from model_checks import depth_model, is_depth_key, randomise_depth
from safetensors.torch import load_file, save_file
from tiny_hosts import random_ids, tiny_stock_model
from transformers import AutoModel, AutoModelForCausalLM

BOTH = {"num_blocks": 2, "depth_kv": "attention+mlp", "depth_gate": "head"}

# As in vLLM's backend for transformers' models, whose base model is `AutoModel` under the name `model`.
VLLM_PREFIXES = {
    "": "model.",
    "model.model.": "model.",
    "model.lm_head.": "lm_head.",
    "model.score.": "classifier.",
    "model.classifier.": "classifier.",
}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = depth_model(tiny_stock_model("llama"), **BOTH)
    randomise_depth(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 12)[None]).logits


# --- PEFT ---


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["q_proj", "v_proj"]], ids=["host only", "projections too"])
def test_an_adapter_with_shared_matrices_reloads(saved, targets, tmp_path):
    """VeRA saves its shared random matrices at the top of the model, under the model's own prefix."""
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not [str(warning.message) for warning in caught if "key" in str(warning.message)]
    assert torch.equal(logits(reloaded), logits(adapted))
    assert not torch.equal(logits(reloaded), logits(AutoModelForCausalLM.from_pretrained(saved)))


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r".*\.layers\.(0|1)\.mlp\.(gate|up|down)_proj"},
        {"target_modules": ["model.layers.0.self_attn.o_proj", "layers.2.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "rank_pattern": {r"model.layers.1.self_attn.q_proj": 2}},
    ],
    ids=["attention", "mlp", "full names", "layer numbers", "ranks"],
)
def test_names_and_patterns_of_the_host_match_the_same_modules(saved, choice):
    peft = pytest.importorskip("peft")

    def adapted(model) -> dict[str, torch.Size]:
        model = peft.get_peft_model(model, peft.LoraConfig(**choice))
        return {name: parameter.shape for name, parameter in model.named_parameters() if "lora_" in name}

    expected = adapted(tiny_stock_model("llama"))
    assert expected and adapted(AutoModelForCausalLM.from_pretrained(saved)) == expected


# --- tensor by tensor ---


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("host", ["llama", "olmo2", "gemma2"])
def test_every_key_has_a_place_in_an_engine_that_prefixes_the_base_model(host, auto_class, tmp_path):
    model = depth_model(tiny_stock_model(host), **BOTH)
    (model if auto_class is AutoModelForCausalLM else model.model).save_pretrained(tmp_path)
    places = {f"model.{name}" for name in AutoModel.from_config(model.config).state_dict()} | {"lm_head.weight"}
    mapped = set()
    for key in load_file(tmp_path / "model.safetensors"):
        for prefix, new in VLLM_PREFIXES.items():
            key = new + key.removeprefix(prefix) if key.startswith(prefix) else key
        mapped.add(key)
    assert mapped <= places
    assert places - mapped <= {"lm_head.weight"}


def test_a_mean_of_two_checkpoints_by_the_names_in_their_files_is_the_mean_of_the_models(saved, tmp_path):
    """As mergekit works."""
    first = AutoModelForCausalLM.from_pretrained(saved)
    second = AutoModelForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second.save_pretrained(tmp_path / "second")
    tensors, others = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "second"))
    assert tensors.keys() == others.keys() == first.state_dict().keys()
    assert {name.split(".")[-2] for name in tensors if is_depth_key(name)} >= {"depth_reads", "attn_depth_kv"}
    shutil.copytree(saved, tmp_path / "merged")
    merged = {name: (tensor + others[name]) / 2 for name, tensor in tensors.items()}
    save_file(merged, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
            parameter.copy_((parameter + other) / 2)
    assert torch.equal(logits(loaded), logits(first))
    assert loaded(random_ids(1, 4)).logits.isfinite().all()
