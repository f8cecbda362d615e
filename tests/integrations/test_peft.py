"""PEFT: LoRA on the host beside depth modules that are trained whole, its config, "all-linear", checkpointing."""

import copy
from functools import partial

import pytest
import torch
from moda_models import COMBINATIONS, moda_model
from model_checks import LOADS_MODULES_TO_SAVE, depth_model, relative_max_error
from peft_models import (
    adapted_modules,
    logits,
    peft,
    randomise_adapter,
    small_model,
    train_steps,
    zero_query_model,
)
from safetensors.torch import load_file
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_depthattn.integrations.peft as peft_depthattn
from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForSequenceClassification,
    DepthAttnModel,
    depth_param_groups,
    lora_config,
)
from hf_depthattn.attn_res_reads import DEPTH_READS
from hf_depthattn.depth_connections import DEPTH_MODULES
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs, depth_parameter_names, is_depth_name

VARIANTS = {"static": {}, "input": {"query": "input"}, "static_mix": {"static_mix": True}}
KV_MODULES = ["attn_depth_kv", "mlp_depth_kv"]
TARGETS = {"default": None, "names": ["q_proj", "k_proj"], "all-linear": "all-linear", "pattern": r".*\.[kv]_proj"}
MODA_MODELS = {label: partial(moda_model, **fields) for label, fields in COMBINATIONS.items()}
#: label -> function that makes a model of a scheme
MODELS = {label: partial(small_model, **fields) for label, fields in VARIANTS.items()} | MODA_MODELS
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def depth_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a depth parameter has in a model of a dtype: matrices follow, queries and gates stay in float32."""
    return dtype if ".mlp_depth_kv." in name else torch.float32


# --- LoRA and trained depth modules ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_trained_adapter_saves_reloads_merges_and_disables(tmp_path, make_model, dtype):
    base, ids = make_model().to(dtype), random_ids(2, 11)
    fresh, base_logits = copy.deepcopy(base), logits(base, ids)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_steps(model, ids)
    kept = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    # The first site reads one source: nothing to learn there.
    assert {name for name in kept if ".0.attn_depth." not in name} == set()
    for name, parameter in model.named_parameters():
        if name in before and name.endswith(".query"):
            assert (parameter != before[name]).any(dim=1).tolist() == [False] + [True] * 6
    assert all(p.dtype == depth_dtype(name, dtype) for name, p in model.named_parameters() if is_depth_name(name))
    expected = logits(model, ids)
    assert relative_max_error(expected, base_logits) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base_logits)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    depth_names = {f"base_model.model.{name}" for name in depth_parameter_names(fresh)}
    has_moda = base.config.depth_kv is not None
    assert sum(".attn_depth_kv.gate" in name for name in depth_names) == (2 if has_moda else 0)
    assert sum(".mlp_depth_kv." in name for name in depth_names) == (4 if has_moda else 0)
    assert depth_names <= saved.keys()
    assert all(saved[name].dtype == depth_dtype(name, dtype) for name in depth_names)
    assert all(name in depth_names or ".lora_" in name for name in saved)

    # PEFT rounds LoRA matrices to the dtype of the model when it saves memory.
    for low_memory in (False, True) if dtype == torch.float32 else (False,):
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(reloaded, ids), expected)
    if LOADS_MODULES_TO_SAVE and dtype == torch.float32:
        integrated = copy.deepcopy(fresh)
        integrated.load_adapter(str(tmp_path))
        assert torch.equal(logits(integrated, ids), expected)

    model.double()
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert type(merged) is type(fresh)
    assert relative_max_error(logits(merged, ids), expected) <= 1e-12


@pytest.mark.parametrize(
    "make_model",
    [lambda: zero_query_model(tiny_stock_model("llama")), *MODA_MODELS.values()],
    ids=["zero queries", *MODA_MODELS],
)
def test_merged_model_is_an_ordinary_checkpoint(tmp_path, make_model):
    base, ids = make_model(), random_ids(2, 11)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    train_steps(model, ids)
    expected = logits(model, ids)
    merged = model.merge_and_unload()
    assert (logits(merged, ids) - expected).abs().max() <= 1e-5
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path), ids), logits(merged, ids))


def test_adapter_is_small(tmp_path):
    base = small_model(stock=tiny_stock_model("llama", vocab_size=4001))
    model = peft.get_peft_model(base, lora_config(base, r=2))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 0.05 * sum(p.numel() * p.element_size() for p in base.parameters())


def test_experts_adapter_saves_and_reloads(tmp_path):
    base, ids = small_model("qwen3_moe"), random_ids(2, 11)
    fresh = copy.deepcopy(base)
    model = peft.get_peft_model(base, lora_config(base, r=4, target_parameters=EXPERTS))
    train_steps(model, ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path), ids), logits(model, ids))


def test_outputs_and_generation_work_under_peft():
    base, ids = small_model(), random_ids(2, 7)
    model = peft.get_peft_model(base, lora_config(base, r=4)).eval()
    randomise_adapter(model)
    outputs = model(input_ids=ids, output_hidden_states=True, output_depth_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert len(outputs.depth_attentions) == 7
    cached = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    uncached = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_trainer_resumes_an_adapter_bit_exactly(tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(24, 11)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    base = small_model()
    model = peft.get_peft_model(base, lora_config(base, r=4))
    resumed = copy.deepcopy(model)
    for instance, checkpoint in ((model, None), (resumed, str(tmp_path / "checkpoint-2"))):
        optimizer = depth_optimizer_cls_and_kwargs(args, depth_lr_factor=5.0)
        trainer = Trainer(instance, args, train_dataset=rows, optimizer_cls_and_kwargs=optimizer)
        trainer.train(resume_from_checkpoint=checkpoint)
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in resumed.named_parameters())


def test_depth_names_and_groups_work_under_peft():
    base = small_model()
    model = peft.get_peft_model(base, lora_config(base, r=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and is_depth_name(name)}
    assert trained <= set(depth_parameter_names(model))
    *_, depth = depth_param_groups(model, lr=1.0, weight_decay=0.1)
    assert {id(p) for p in depth["params"]} == {id(p) for n, p in model.named_parameters() if n in trained}
    prefix = "base_model.model.model.depth_reads.modules_to_save.default"
    assert trained == {f"{prefix}.query", f"{prefix}.key_norm"}


# --- the config ---


def test_config_names_linear_layers_of_the_host_and_depth_modules():
    config = lora_config(small_model())
    assert sorted(config.target_modules) == LINEAR
    assert list(config.modules_to_save) == [DEPTH_READS]
    assert lora_config(small_model(query="input")).modules_to_save == [DEPTH_READS, *DEPTH_MODULES]
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("host", ["phi3", "deepseek_v3", "gemma2", "phimoe", "kimi_linear", "gpt_oss"])
def test_config_fits_other_hosts(host):
    base, ids = small_model(host), random_ids(2, 11)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    linear = [
        name for name, m in base.get_decoder().layers.named_modules() if type(m) is nn.Linear and "lora" not in name
    ]
    assert len(linear) == len(adapted_modules(model)) > 0
    model(input_ids=ids, labels=ids).loss.backward()
    # lora_A has no gradient as long as lora_B is zero.
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.any() for grad in grads)


def test_given_fields_win_and_lists_are_completed():
    model = small_model()
    config = lora_config(model, r=3, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type=None)
    assert (config.r, config.target_modules, config.task_type) == (3, {"q_proj"}, None)
    assert list(config.modules_to_save) == ["lm_head", DEPTH_READS]
    assert lora_config(model, train_depth=False).modules_to_save is None
    for excluded in (["o_proj", "0.self_attn.q_proj"], r".*\.(o_proj|layers\.0\.self_attn\.q_proj)"):
        adapted = adapted_modules(
            peft.get_peft_model(
                small_model(query="input"), lora_config(model, target_modules="all-linear", exclude_modules=excluded)
            )
        )
        assert len(adapted) == 7 * 3 - 3 - 1
        assert not any(name.endswith(("o_proj", "layers.0.self_attn.q_proj")) or "_depth" in name for name in adapted)


def test_classification_and_base_models():
    stock = tiny_stock_model("llama")
    config = DepthAttnConfig.attn_res(stock.config, num_labels=3)
    model = DepthAttnForSequenceClassification(config)
    classifier = peft.get_peft_model(model, lora_config(model, r=4))
    assert classifier.peft_config["default"].task_type == "SEQ_CLS"
    trained = [name for name, p in classifier.named_parameters() if p.requires_grad and "lora" not in name]
    assert sum("score" in name for name in trained) == 1
    assert sum(is_depth_name(name) for name in trained) == 2
    base = DepthAttnModel(config)
    assert sorted(lora_config(base).target_modules) == LINEAR
    assert lora_config(base).task_type is None


def test_residual_control_saves_no_depth_modules(tmp_path):
    base, ids = depth_model(tiny_stock_model("llama"), connection="residual"), random_ids(2, 11)
    model = peft.get_peft_model(base, lora_config(base, r=4))
    assert model.peft_config["default"].modules_to_save is None
    train_steps(model, ids)
    model.save_pretrained(tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_stock_model_is_refused():
    with pytest.raises(ValueError, match="has no depth modules"):
        lora_config(tiny_stock_model("llama"))


def test_missing_peft_names_the_extra(monkeypatch):
    monkeypatch.setattr(peft_depthattn, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match=r"hf-depthattn\[peft\]"):
        lora_config(small_model())


# --- no dead adapters ---


@pytest.mark.parametrize("train_depth", [True, False])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_all_linear_creates_no_dead_adapters(fields, train_depth):
    base, ids = small_model(**fields), random_ids(2, 11)
    model = peft.get_peft_model(base, lora_config(base, train_depth=train_depth, target_modules="all-linear"))
    adapted = adapted_modules(model)
    assert len(adapted) == 7 * 3
    assert not any(is_depth_name(name) or name.endswith("lm_head") for name in adapted)
    randomise_adapter(model)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert all(grad is not None and grad.any() for grad in grads.values())


def test_plain_all_linear_config_leaves_one_dead_adapter_with_an_input_query():
    """Why `lora_config` excludes depth sites: the first site reads one source, so no adapter there can learn."""
    model = peft.get_peft_model(small_model(query="input"), peft.LoraConfig(target_modules="all-linear"))
    randomise_adapter(model)
    ids = random_ids(2, 11)
    model(input_ids=ids, labels=ids).loss.backward()
    dead = {n.split(".lora_")[0] for n, p in model.named_parameters() if "lora_" in n and not p.grad.any()}
    assert {name.split(".layers.")[1] for name in dead} == {"0.attn_depth.query_proj"}


@pytest.mark.parametrize("host", ["llama", "phi3", "deepseek_v3"])
def test_config_without_targets_gets_the_usual_ones(host):
    adapted = adapted_modules(peft.get_peft_model(small_model(host), peft.LoraConfig()))
    assert adapted
    assert all("self_attn" in name for name in adapted)


# --- the config, with MoDA ---


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
    "with AttnRes": ({"connection": "attn_res"}, [DEPTH_READS, *KV_MODULES]),
    "attention slots with AttnRes": (
        {"connection": "attn_res", "depth_kv": "attention"},
        [DEPTH_READS, "attn_depth_kv"],
    ),
}


@pytest.mark.parametrize("fields, expected", MODULES_TO_SAVE.values(), ids=MODULES_TO_SAVE)
def test_modules_to_save_are_those_that_the_model_has(fields, expected):
    model = moda_model(**fields)
    assert lora_config(model).modules_to_save == expected
    assert lora_config(model, modules_to_save=["lm_head"]).modules_to_save == ["lm_head", *(expected or [])]
    peft.get_peft_model(model, lora_config(model))(input_ids=random_ids(1, 5))


# --- checkpointing ---


@pytest.mark.parametrize("prepare", ["enable_input_require_grads", "prepare_model_for_kbit_training"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("schedule, tolerance", {"single": 0.0, "grouped": 2e-6}.items())
def test_checkpointing_gives_the_same_gradients(prepare, reentrant, schedule, tolerance):
    """Groups of reads end with a checkpointed layer, which changes the order of sums."""
    torch.manual_seed(7)
    base, ids = small_model(), random_ids(2, 11)
    base.config.attn_res_schedule = schedule
    torch.manual_seed(8)
    plain = peft.get_peft_model(copy.deepcopy(base), lora_config(base, r=4))
    kwargs = {"use_reentrant": reentrant}
    if prepare == "enable_input_require_grads":
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    else:
        base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
    torch.manual_seed(8)
    checkpointed = peft.get_peft_model(base, lora_config(base, r=4))
    for model in (plain, checkpointed):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    actual = {name: p.grad for name, p in checkpointed.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad) or relative_max_error(actual[name], grad) <= tolerance, name
    assert any(grad.any() for name, grad in actual.items() if is_depth_name(name))


def test_lora_config_takes_a_single_module_to_save_and_refuses_wrapped_models():
    model = depth_model(tiny_stock_model("llama"))
    config = lora_config(model, modules_to_save="lm_head")
    assert set(config.modules_to_save) == {"lm_head", DEPTH_READS}
    with pytest.raises(ValueError, match="already has adapters"):
        lora_config(peft.get_peft_model(model, config))
