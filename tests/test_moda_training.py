"""Training with MoDA: gates are depth parameters, projections are hidden matrices; Trainer, resuming, wrappers."""

import copy

import pytest
import torch
import torch.distributed as dist
from moda_models import COMBINATIONS, moda_model
from model_checks import is_depth_key
from tiny_hosts import random_ids
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_depthattn import depth_param_groups
from hf_depthattn.connection_base import DepthSite
from hf_depthattn.integrations.trainer import (
    depth_optimizer_cls_and_kwargs,
    depth_parameter_names,
    is_depth_name,
    is_layer_name,
    is_projection_name,
    muon_optimizer_cls_and_kwargs,
    muon_param_groups,
)
from hf_depthattn.moda_slots import DepthGate, MLPDepthKV

LR, DECAY, FACTOR = 1e-2, 0.1, 5.0
OPTIMIZERS = {"adamw": depth_optimizer_cls_and_kwargs, "muon": muon_optimizer_cls_and_kwargs}
every_combination = pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS)


def parameters_in(model: nn.Module, *kinds: type[nn.Module]) -> set[int]:
    return {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}


def train(model, folder, *, optimizer=depth_optimizer_cls_and_kwargs, resume=None, **arguments) -> Trainer:
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(32, 11)]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"learning_rate": LR, "weight_decay": DECAY, "save_strategy": "no", **arguments},
    )
    kwargs = optimizer(args, depth_lr_factor=FACTOR)
    trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def moved(model: nn.Module, before: dict) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


# --- names and groups ---


@every_combination
def test_depth_names_are_what_is_not_the_hosts(fields):
    model = moda_model(**fields)
    named = dict(model.named_parameters())
    added = parameters_in(model, DepthSite, DepthGate, MLPDepthKV)
    assert {id(named[name]) for name in depth_parameter_names(model)} == added
    assert {id(p) for name, p in named.items() if is_projection_name(name)} == parameters_in(model, MLPDepthKV)
    in_layers = {id(p) for p in model.get_decoder().layers.parameters()}
    assert {id(p) for name, p in named.items() if is_layer_name(name)} == in_layers - added
    assert is_depth_name("model.layers.0.mlp_depth_kv") and not is_depth_name("model.layers.0.mlp")


@every_combination
def test_gates_are_in_the_depth_group_and_projections_with_the_hosts_matrices(fields):
    model = moda_model(**fields)
    names = [name for name, _ in model.named_parameters()]
    for decay_names in (None, names):
        decayed, *undecayed, depth = depth_param_groups(
            model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR, decay_parameter_names=decay_names
        )
        assert {id(p) for p in depth["params"]} == parameters_in(model, DepthSite, DepthGate)
        assert (depth["lr"], depth["weight_decay"]) == (LR * FACTOR, 0.0)
        assert (decayed["lr"], decayed["weight_decay"]) == (LR, DECAY)
        assert parameters_in(model, MLPDepthKV) <= {id(p) for p in decayed["params"]}
        assert sum(len(group["params"]) for group in (decayed, *undecayed, depth)) == len(names)


@every_combination
def test_muon_gets_the_projections_and_never_a_gate(fields):
    model = moda_model(**fields)
    groups = muon_param_groups(model, lr=LR, weight_decay=DECAY, depth_lr_factor=FACTOR)
    by_muon = {id(p) for group in groups if group["use_muon"] for p in group["params"]}
    assert parameters_in(model, MLPDepthKV) <= by_muon
    assert by_muon.isdisjoint(parameters_in(model, DepthSite, DepthGate))


# --- Trainer ---


def test_gates_are_not_decayed_and_projections_are(tmp_path):
    """With a learning rate so small that only decay could move anything."""
    model = moda_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tmp_path, learning_rate=1e-12, weight_decay=1e10)
    for name, parameter in model.named_parameters():
        ratio = (parameter.norm() / before[name].norm()).item()
        assert (ratio < 0.99) == (parameter.ndim == 2), name


@every_combination
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_resume_is_bit_exact_from_closed_gates(tmp_path, optimizer, fields):
    model = moda_model(open_gates=False, **fields)
    before = copy.deepcopy(dict(model.named_parameters()))
    resumed = copy.deepcopy(model)
    train(model, tmp_path, optimizer=optimizer, save_strategy="steps", save_steps=3)
    # Gates have a gradient at once, projections as soon as gates have moved.
    assert set(depth_parameter_names(model)) - moved(model, before) == {
        name for name in before if ".layers.0.attn_depth." in name
    }
    train(resumed, tmp_path, optimizer=optimizer, resume=str(tmp_path / "checkpoint-3"))
    assert moved(resumed, dict(model.named_parameters())) == set()
    # And both differ from where they resumed.
    saved = type(model).from_pretrained(tmp_path / "checkpoint-3")
    gates = {name for name in before if name.endswith(".gate")}
    assert len(gates) == 2 and gates <= moved(saved, dict(model.named_parameters()))


@every_combination
def test_half_precision_training_keeps_gates_in_float32_and_moves_them(tmp_path, fields):
    model = moda_model(open_gates=False, **fields).to(torch.bfloat16)
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, tmp_path, learning_rate=1e-4, bf16=True)
    for name, parameter in model.named_parameters():
        kept = is_depth_key(name) and not is_projection_name(name)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert {name for name in before if name.endswith(".gate")} <= moved(model, before)
    trained = dict(model.named_parameters())
    trained_gate = trained["model.layers.1.attn_depth_kv.gate"]
    assert not torch.equal(trained_gate, trained_gate.bfloat16().float())


@every_combination
def test_checkpointing_through_trainer_changes_nothing(tmp_path, fields):
    plain = moda_model(**fields)
    checkpointed = copy.deepcopy(plain)
    train(plain, tmp_path)
    checkpointed.gradient_checkpointing_enable()
    train(checkpointed, tmp_path)
    assert moved(checkpointed, dict(plain.named_parameters())) == set()


# --- DDP, in a process group of one ---


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_combination
@pytest.mark.parametrize("open_gates", [False, True], ids=["gates 0", "gates open"])
def test_every_parameter_has_a_gradient_under_ddp(process_group, fields, open_gates):
    """While gates are zero, projections have a gradient of zero, not none: DDP need not search unused parameters."""
    model, ids = moda_model(open_gates=open_gates, **fields).train(), random_ids(2, 11)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert depth_parameter_names(wrapped) == [f"module.{name}" for name in depth_parameter_names(model)]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0 if open_gates else 0.0)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith(".gate"):
            assert parameter.grad.ne(0).all(), name
        if is_projection_name(name):
            assert bool(parameter.grad.any()) == open_gates, name
