"""Training: parameter groups, Trainer with AdamW and with Muon, resuming, checkpointing, wrappers."""

import copy
import logging
import runpy
import sys

import pytest
import torch
import torch.distributed as dist
from model_checks import depth_model, randomise_depth
from repository import ROOT
from tiny_hosts import random_ids, tiny_stock_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_depthattn import attn_res_connection, depth_param_groups
from hf_depthattn.connection_base import DepthSite
from hf_depthattn.integrations.trainer import (
    MuonWithAdamW,
    depth_optimizer_cls_and_kwargs,
    depth_parameter_names,
    muon_optimizer_cls_and_kwargs,
    muon_param_groups,
)

EXAMPLE = ROOT / "examples" / "finetune_trainer.py"
LR, DECAY, FACTOR = 1e-2, 0.1, 5.0
VARIANTS = {"static": {}, "input": {"query": "input"}, "static_mix": {"static_mix": True, "num_depth_heads": 2}}
OPTIMIZERS = {"adamw": depth_optimizer_cls_and_kwargs, "muon": muon_optimizer_cls_and_kwargs}
# `gradient_checkpointing` got a new name; both must lead to the non-reentrant form.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


def small_model(host: str = "llama", **fields):
    model = depth_model(tiny_stock_model(host), sublayers_per_block=2, read_scale="sum", **fields)
    randomise_depth(model)
    return model


def rows(num_rows: int = 32, length: int = 11) -> list[dict]:
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(num_rows, length)]


def training_arguments(folder, *, steps=4, **arguments) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": LR, "weight_decay": DECAY, "save_strategy": "no", **arguments},
    )


def train(model, folder, data, *, optimizer=None, resume=None, **arguments) -> Trainer:
    args = training_arguments(folder, **arguments)
    kwargs = {} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer(args, depth_lr_factor=FACTOR)}
    trainer = Trainer(model, args, train_dataset=data, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters_in_sites(model) -> set[int]:
    return {id(p) for site in model.modules() if isinstance(site, DepthSite) for p in site.parameters()}


def assert_same_parameters(model, other):
    expected = dict(other.named_parameters())
    assert [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])] == []


def backward(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


# --- names and groups ---


@pytest.mark.parametrize("fields", [{}, {"depth_kv": "attention+mlp"}], ids=["attn_res", "both"])
def test_predictions_are_the_logits_without_the_cache(tmp_path, fields):
    model = small_model(**fields)
    trainer = Trainer(model=model, args=training_arguments(tmp_path, per_device_eval_batch_size=3))
    data = rows(5)
    model.config.use_cache = True  # Trainer switches it off
    predictions = trainer.predict(data).predictions
    ids = torch.stack([row["input_ids"] for row in data])
    assert torch.allclose(torch.from_numpy(predictions), model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_depth_names_are_the_parameters_in_depth_sites(fields):
    model = small_model(**fields)
    named = dict(model.named_parameters())
    assert {id(named[name]) for name in depth_parameter_names(model)} == parameters_in_sites(model) != set()


def test_depth_names_are_found_in_a_compiled_model():
    model = small_model()
    assert depth_parameter_names(torch.compile(model)) == [f"_orig_mod.{n}" for n in depth_parameter_names(model)]


@pytest.mark.parametrize("host", ["llama", "gemma2", "qwen2", "qwen3_moe"])
def test_groups_hold_every_trainable_parameter_once(host):
    model = small_model(host)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" not in name)
    groups = depth_param_groups(model, lr=LR, weight_decay=DECAY)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_groups_follow_trainer_on_the_host_and_never_decay_depth(fields):
    model = small_model(**fields)
    decayed, undecayed, depth = depth_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    assert {id(p) for p in depth["params"]} == parameters_in_sites(model)
    assert (depth["lr"], depth["weight_decay"]) == (LR * FACTOR, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (LR, DECAY)
    assert (undecayed["lr"], undecayed["weight_decay"]) == (LR, 0.0)
    names = set(Trainer.get_decay_parameter_names(None, model))
    by_trainer = {id(p) for name, p in model.named_parameters() if name in names}
    assert {id(p) for p in decayed["params"]} == by_trainer - parameters_in_sites(model)
    assert {p.ndim for p in undecayed["params"]} == {1}


def test_depth_is_not_decayed_even_if_named():
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    decayed, depth = depth_param_groups(model, lr=LR, weight_decay=DECAY, decay_parameter_names=names)
    assert {id(p) for p in depth["params"]} == parameters_in_sites(model)
    assert depth["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(depth["params"]) == len(names)


def test_empty_groups_are_dropped():
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_depth." in name)
    (depth,) = depth_param_groups(model, lr=LR, weight_decay=DECAY)
    assert {id(p) for p in depth["params"]} == parameters_in_sites(model)
    residual = depth_model(tiny_stock_model("llama"), connection="residual")
    assert len(depth_param_groups(residual, lr=LR, weight_decay=DECAY)) == 2


def test_negative_factor_is_refused():
    with pytest.raises(ValueError, match=r"depth_lr_factor: -1"):
        depth_param_groups(small_model(), lr=LR, depth_lr_factor=-1)


# --- Trainer ---


def test_schedule_keeps_the_factor_and_the_logged_rate_is_the_hosts(tmp_path):
    trainer = train(small_model(), tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs, steps=4)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([LR * (4 - step) / 4 for step in range(4)])
    trainer = train(
        small_model(),
        tmp_path,
        rows(),
        optimizer=depth_optimizer_cls_and_kwargs,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": LR / 10},
    )
    assert trainer.get_learning_rates() == pytest.approx([LR / 10, LR / 10, LR / 10 * FACTOR])


def test_trainer_arguments_reach_the_optimizer(tmp_path):
    trainer = train(
        small_model(), tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs, optim="adamw_torch", adam_beta1=0.8
    )
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0, 0.0]
    assert {group["betas"][0] for group in optimizer.param_groups} == {0.8}


def test_depth_moves_without_decay(tmp_path):
    """With a learning rate so small that only decay could move anything, host matrices shrink and queries stay."""
    model = small_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs, learning_rate=1e-12, weight_decay=1e10)
    for name, parameter in model.named_parameters():
        ratio = (parameter.norm() / before[name].norm()).item()
        assert (ratio < 0.99) == (parameter.ndim == 2), name


def test_plain_trainer_decays_queries_and_nothing_else_breaks(tmp_path):
    model = small_model()
    decayed, undecayed = train(model, tmp_path, rows()).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(names[id(p)].endswith("_depth.query") for p in decayed["params"]) == 7
    assert sum(names[id(p)].endswith("key_norm.weight") for p in undecayed["params"]) == 7
    assert all(p.isfinite().all() for p in model.parameters())


def test_optimizer_that_chooses_parameters_is_refused(tmp_path, monkeypatch):
    choice = (torch.optim.AdamW, {"lr": LR, "params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: choice))
    with pytest.raises(ValueError, match=r"optim: .* chooses parameters itself"):
        train(small_model(), tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs)


@pytest.mark.parametrize("host", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resume_is_bit_exact(tmp_path, optimizer, host):
    model, data = small_model(host), rows()
    resumed = copy.deepcopy(model)
    train(model, tmp_path, data, optimizer=optimizer, steps=6, save_strategy="steps", save_steps=3)
    train(resumed, tmp_path, data, optimizer=optimizer, steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert_same_parameters(resumed, model)


def test_best_model_is_loaded_at_the_end(tmp_path):
    model, data, scores = small_model(), rows(), iter((1.0, 0.0))
    args = training_arguments(
        tmp_path,
        steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = Trainer(
        model, args, train_dataset=data, eval_dataset=data[:4], compute_metrics=lambda _: {"score": next(scores)}
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert_same_parameters(model, type(model).from_pretrained(trainer.state.best_model_checkpoint))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["default", "non-reentrant", "reentrant"])
def test_checkpointing_through_trainer_changes_nothing(tmp_path, reentrant, caplog):
    plain = small_model()
    checkpointed, data = copy.deepcopy(plain), rows()
    train(plain, tmp_path, data, optimizer=depth_optimizer_cls_and_kwargs)
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_depthattn.modeling_depthattn"):
        train(
            checkpointed,
            tmp_path,
            data,
            optimizer=depth_optimizer_cls_and_kwargs,
            **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs},
        )
    assert sum("use_reentrant" in record.message for record in caplog.records) == bool(reentrant)
    assert checkpointed.is_gradient_checkpointing
    assert_same_parameters(checkpointed, plain)


# --- Muon ---


@pytest.mark.parametrize("host", ["llama", "qwen3_moe", "kimi_linear"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_muon_gets_hidden_matrices_only(host, fields):
    model = small_model(host, **fields)
    groups = muon_param_groups(model, lr=LR, weight_decay=DECAY)
    by_muon = {id(p) for group in groups if group["use_muon"] for p in group["params"]}
    others = {id(p) for group in groups if not group["use_muon"] for p in group["params"]}
    assert not by_muon & others
    assert by_muon | others == {id(p) for p in model.parameters()}
    assert by_muon.isdisjoint(parameters_in_sites(model))
    expected = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "_depth" not in name
    }
    assert expected <= by_muon
    assert {p.ndim for p in model.parameters() if id(p) in by_muon} == {2}
    assert id(model.lm_head.weight) in others
    assert id(model.get_input_embeddings().weight) in others


def test_muon_with_adamw_equals_two_optimizers():
    model, ids = small_model(query="input"), random_ids(2, 11)
    twin = copy.deepcopy(model)
    optimizer = MuonWithAdamW(muon_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR), lr=LR)
    groups = muon_param_groups(twin, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    separate = (
        torch.optim.Muon([g for g in groups if g["use_muon"]], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([g for g in groups if not g["use_muon"]]),
    )
    for _ in range(3):
        for instance, parts in ((model, [optimizer]), (twin, separate)):
            backward(instance, ids)
            for part in parts:
                part.step()
                part.zero_grad()
    assert_same_parameters(model, twin)
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_muon_options_reach_muon(tmp_path):
    def optimizer(args, depth_lr_factor):
        return muon_optimizer_cls_and_kwargs(args, depth_lr_factor=depth_lr_factor, momentum=0.8, ns_steps=3)

    groups = train(small_model(), tmp_path, rows(), optimizer=optimizer).optimizer.param_groups
    assert {(g["momentum"], g["ns_steps"], g["adjust_lr_fn"]) for g in groups if g["use_muon"]} == {
        (0.8, 3, "match_rms_adamw")
    }
    assert [(g["use_muon"], g["weight_decay"]) for g in groups] == [
        (True, DECAY),
        (False, DECAY),
        (False, 0.0),
        (False, 0.0),
    ]


def test_muon_without_hidden_matrices_is_adamw():
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_depth." in name)
    optimizer = MuonWithAdamW(muon_param_groups(model, lr=LR), lr=LR)
    before = model.get_decoder().layers[1].mlp_depth.query.detach().clone()
    backward(model, random_ids(2, 11))
    optimizer.step()
    assert not torch.equal(model.get_decoder().layers[1].mlp_depth.query, before)


# --- wrappers, in a process group of one ---


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_has_a_gradient_under_ddp(process_group, fields):
    """Site 0 has one source; its gradient is zero and not absent, so DDP needs no search for unused parameters."""
    model, ids = small_model(**fields), random_ids(2, 11)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert depth_parameter_names(wrapped) == [f"module.{name}" for name in depth_parameter_names(model)]
    optimizer = torch.optim.AdamW(depth_param_groups(wrapped, lr=LR, weight_decay=DECAY))
    for _ in range(2):
        optimizer.zero_grad()
        backward(wrapped, ids)
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert all(not p.grad.any() for p in model.get_decoder().layers[0].attn_depth.parameters())


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers-only"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fsdp2_trains_as_the_plain_model(process_group, kind, whole, monkeypatch):
    from torch.distributed.fsdp import fully_shard

    # FSDP2 wraps what enters a layer, which hides the taps of `attn_res_pull_ops`: the same order of additions on
    # both sides.
    monkeypatch.setattr(attn_res_connection, "tap", lambda source: source)

    def optimizer_of(instance):
        if kind == "muon":
            return MuonWithAdamW(muon_param_groups(instance, lr=LR, weight_decay=DECAY), lr=LR)
        # With sharded layers only, some parameters are on a mesh and some are not: one kernel cannot take both.
        return torch.optim.AdamW(depth_param_groups(instance, lr=LR, weight_decay=DECAY), foreach=True)

    plain, ids = small_model(), random_ids(2, 11)
    sharded = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in sharded.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    if whole:
        fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        optimizer = optimizer_of(model)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, ids)
            optimizer.step()
    trained = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        actual = trained[name].full_tensor() if hasattr(trained[name], "full_tensor") else trained[name].data
        torch.testing.assert_close(actual, parameter.data, rtol=1e-5, atol=1e-6)


# --- the example ---


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
        assert model.get_decoder().layers[-1].out_depth.query.any()
        assert not moda or model.get_decoder().layers[-1].attn_depth_kv.gate.all()
