"""Training: parameter groups, `Trainer` with AdamW and with Muon, resuming, checkpointing; AttnRes, MoDA and both."""

import copy
import logging
from functools import partial

import pytest
import torch
from moda_models import moda_model
from model_checks import depth_model, is_depth_key
from tiny_hosts import random_ids, tiny_stock_model
from torch import nn
from training_models import (
    DECAY,
    FACTOR,
    LR,
    MODA_MODELS,
    MODELS,
    OPTIMIZERS,
    VARIANTS,
    assert_same_parameters,
    backward,
    moved,
    parameters_in,
    rows,
    small_model,
    train,
    training_arguments,
)
from transformers import Trainer, TrainingArguments

from hf_depthattn import depth_param_groups
from hf_depthattn.attn_res_reads import DepthReads
from hf_depthattn.connection_base import DepthSite
from hf_depthattn.integrations.trainer import (
    MuonWithAdamW,
    depth_optimizer_cls_and_kwargs,
    depth_parameter_names,
    is_depth_name,
    is_layer_name,
    is_projection_name,
    muon_optimizer_cls_and_kwargs,
    muon_param_groups,
)
from hf_depthattn.moda_slots import DepthGate, MLPDepthKV

# `gradient_checkpointing` got a new name; both must lead to the non-reentrant form.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
every_scheme = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
moda_from_closed_gates = {label: partial(make, open_gates=False) for label, make in MODA_MODELS.items()}


# --- names and groups ---


@every_scheme
def test_depth_names_are_what_is_not_the_hosts(make_model):
    model = make_model()
    named = dict(model.named_parameters())
    added = parameters_in(model, DepthReads, DepthSite, DepthGate, MLPDepthKV)
    assert {id(named[name]) for name in depth_parameter_names(model)} == added != set()
    assert {id(p) for name, p in named.items() if is_projection_name(name)} == parameters_in(model, MLPDepthKV)
    in_layers = {id(p) for p in model.get_decoder().layers.parameters()}
    assert {id(p) for name, p in named.items() if is_layer_name(name)} == in_layers - added
    assert is_depth_name("model.layers.0.mlp_depth_kv") and not is_depth_name("model.layers.0.mlp")


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


@every_scheme
def test_groups_follow_trainer_on_the_host_and_never_decay_queries_and_gates(make_model):
    model = make_model()
    small = parameters_in(model, DepthReads, DepthSite, DepthGate)
    decayed, undecayed, depth = depth_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    assert {id(p) for p in depth["params"]} == small
    assert (depth["lr"], depth["weight_decay"]) == (LR * FACTOR, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (LR, DECAY)
    assert (undecayed["lr"], undecayed["weight_decay"]) == (LR, 0.0)
    names = set(Trainer.get_decay_parameter_names(None, model))
    by_trainer = {id(p) for name, p in model.named_parameters() if name in names}
    assert {id(p) for p in decayed["params"]} == by_trainer - small
    assert parameters_in(model, MLPDepthKV) <= {id(p) for p in decayed["params"]}
    assert {p.ndim for p in undecayed["params"]} == {1}
    assert sum(len(group["params"]) for group in (decayed, undecayed, depth)) == len(list(model.parameters()))


@every_scheme
def test_queries_and_gates_are_not_decayed_even_if_named(make_model):
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    decayed, depth = depth_param_groups(
        model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR, decay_parameter_names=names
    )
    assert {id(p) for p in depth["params"]} == parameters_in(model, DepthReads, DepthSite, DepthGate)
    assert (depth["lr"], depth["weight_decay"]) == (LR * FACTOR, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (LR, DECAY)
    assert parameters_in(model, MLPDepthKV) <= {id(p) for p in decayed["params"]}
    assert len(decayed["params"]) + len(depth["params"]) == len(names)


def test_empty_groups_are_dropped():
    model = small_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_depth_name(name))
    (depth,) = depth_param_groups(model, lr=LR, weight_decay=DECAY)
    assert {id(p) for p in depth["params"]} == parameters_in(model, DepthReads) != set()
    residual = depth_model(tiny_stock_model("llama"), connection="residual")
    assert len(depth_param_groups(residual, lr=LR, weight_decay=DECAY)) == 2


def test_negative_factor_is_refused():
    with pytest.raises(ValueError, match=r"depth_lr_factor: -1"):
        depth_param_groups(small_model(), lr=LR, depth_lr_factor=-1)


# --- Trainer ---


@pytest.mark.parametrize("fields", [{}, {"depth_kv": "attention+mlp"}], ids=["attn_res", "both"])
def test_predictions_are_the_logits_without_the_cache(tmp_path, fields):
    model = small_model(**fields)
    trainer = Trainer(model=model, args=training_arguments(tmp_path, per_device_eval_batch_size=3))
    data = rows(5)
    model.config.use_cache = True  # Trainer switches it off
    predictions = trainer.predict(data).predictions
    ids = torch.stack([row["input_ids"] for row in data])
    assert torch.allclose(torch.from_numpy(predictions), model(ids).logits, atol=1e-5)


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


@pytest.mark.parametrize("make_model", [MODELS["static"], MODELS["MoDA"]], ids=["AttnRes", "MoDA"])
def test_queries_and_gates_move_without_decay(tmp_path, make_model):
    """With a learning rate so small that only decay could move anything, host matrices and projections shrink."""
    model = make_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs, learning_rate=1e-12, weight_decay=1e10)
    for name, parameter in model.named_parameters():
        ratio = (parameter.norm() / before[name].norm()).item()
        assert (ratio < 0.99) == (parameter.ndim == 2 and "depth_reads" not in name), name


def test_plain_trainer_decays_queries_and_nothing_else_breaks(tmp_path):
    model = small_model()
    decayed, undecayed = train(model, tmp_path, rows()).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, name in ((decayed, "query"), (undecayed, "key_norm")):
        assert [names[id(p)] for p in group["params"] if is_depth_name(names[id(p)])] == [f"model.depth_reads.{name}"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_optimizer_that_chooses_parameters_is_refused(tmp_path, monkeypatch):
    choice = (torch.optim.AdamW, {"lr": LR, "params": []})
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args, model=None: choice))
    with pytest.raises(ValueError, match=r"optim: .* selects parameters itself"):
        train(small_model(), tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs)


RESUMED = {
    "llama": small_model,
    "qwen3_moe": partial(small_model, "qwen3_moe"),
    **{f"{label}, gates 0": make_model for label, make_model in moda_from_closed_gates.items()},
}


@pytest.mark.parametrize("make_model", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resume_is_bit_exact(tmp_path, optimizer, make_model):
    model, data = make_model(), rows()
    before = copy.deepcopy(dict(model.named_parameters()))
    resumed = copy.deepcopy(model)
    train(model, tmp_path, data, optimizer=optimizer, steps=6, save_strategy="steps", save_steps=3)
    # Gates have a gradient at once, projections as soon as gates have moved; the first site reads one source.
    assert set(depth_parameter_names(model)) - moved(model, before) == {
        name for name in before if ".layers.0.attn_depth." in name
    }
    train(resumed, tmp_path, data, optimizer=optimizer, steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert_same_parameters(resumed, model)
    # And both differ from where they resumed.
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    since = moved(saved, dict(model.named_parameters()))
    gates = {name for name in before if name.endswith(".gate")}
    assert len(gates) == (0 if model.config.depth_kv is None else 2) and gates <= since != set()


@pytest.mark.parametrize("make_model", moda_from_closed_gates.values(), ids=moda_from_closed_gates)
def test_half_precision_training_keeps_gates_in_float32_and_moves_them(tmp_path, make_model):
    model = make_model().to(torch.bfloat16)
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tmp_path, rows(), optimizer=depth_optimizer_cls_and_kwargs, steps=6, learning_rate=1e-4, bf16=True)
    for name, parameter in model.named_parameters():
        kept = is_depth_key(name) and not is_projection_name(name)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert {name for name in before if name.endswith(".gate")} <= moved(model, before)
    trained_gate = dict(model.named_parameters())["model.layers.1.attn_depth_kv.gate"]
    assert not torch.equal(trained_gate, trained_gate.bfloat16().float())


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
    # Grouped reads end with a checkpointed layer and then round differently.
    plain.config.attn_res_schedule = "single"
    checkpointed, data = copy.deepcopy(plain), rows()
    train(plain, tmp_path, data, optimizer=depth_optimizer_cls_and_kwargs)
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
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


@pytest.mark.parametrize("make_model", MODA_MODELS.values(), ids=MODA_MODELS)
def test_checkpointing_on_the_model_changes_nothing(tmp_path, make_model):
    plain, data = make_model(), rows()
    plain.config.attn_res_schedule = "single"
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        train(model, tmp_path, data, optimizer=depth_optimizer_cls_and_kwargs, steps=6)
    assert_same_parameters(checkpointed, plain)


# --- Muon ---


MUON_MODELS = {
    f"{host}, {label}": partial(small_model, host, **fields)
    for host in ("llama", "qwen3_moe", "kimi_linear")
    for label, fields in VARIANTS.items()
} | MODA_MODELS


def test_biases_of_projections_are_trained_like_those_of_the_host():
    model = moda_model(depth_kv_bias=True)
    biases = {id(p) for name, p in model.named_parameters() if "mlp_depth_kv" in name and name.endswith("bias")}
    assert len(biases) == 2 * 2
    _, undecayed, _ = depth_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    assert biases <= {id(p) for p in undecayed["params"]}
    for group in muon_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR):
        if biases & {id(p) for p in group["params"]}:
            assert (group["use_muon"], group["weight_decay"], group["lr"]) == (False, 0.0, LR)


@pytest.mark.parametrize("make_model", MUON_MODELS.values(), ids=MUON_MODELS)
def test_muon_gets_hidden_matrices_only(make_model):
    """Projections of MoDA are some; queries and gates are not."""
    model = make_model()
    groups = muon_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    by_muon = {id(p) for group in groups if group["use_muon"] for p in group["params"]}
    others = {id(p) for group in groups if not group["use_muon"] for p in group["params"]}
    assert not by_muon & others
    assert by_muon | others == {id(p) for p in model.parameters()}
    assert by_muon.isdisjoint(parameters_in(model, DepthReads, DepthSite, DepthGate))
    assert parameters_in(model, MLPDepthKV) <= by_muon
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
        parameter.requires_grad_(is_depth_name(name))
    optimizer = MuonWithAdamW(muon_param_groups(model, lr=LR), lr=LR)
    query = model.get_decoder().depth_reads.query
    before = query.detach().clone()
    backward(model, random_ids(2, 11))
    optimizer.step()
    # The first site reads one source: nothing to learn there.
    assert [torch.equal(*rows) for rows in zip(query, before, strict=True)] == [True] + [False] * 6
