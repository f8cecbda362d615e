"""Helpers of the training tests: models of each mechanism, a short run of `Trainer`, comparisons of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from moda_models import COMBINATIONS, moda_model
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_depthattn import DepthAttnForCausalLM
from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs, muon_optimizer_cls_and_kwargs

LR, DECAY, FACTOR = 1e-2, 0.1, 5.0
OPTIMIZERS = {"adamw": depth_optimizer_cls_and_kwargs, "muon": muon_optimizer_cls_and_kwargs}


def small_model(host: str = "llama", **fields) -> DepthAttnForCausalLM:
    """Build a model with AttnRes and random depth parameters."""
    model = depth_model(tiny_stock_model(host), sublayers_per_block=2, read_scale="sum", **fields)
    randomise_depth(model)
    return model


VARIANTS = {"static": {}, "input": {"query": "input"}, "static_mix": {"static_mix": True, "num_depth_heads": 2}}
ATTN_RES_MODELS = {label: partial(small_model, **fields) for label, fields in VARIANTS.items()}
MODA_MODELS = {label: partial(moda_model, **fields) for label, fields in COMBINATIONS.items()}
#: label -> function that builds a model
MODELS: dict[str, Callable[..., DepthAttnForCausalLM]] = {**ATTN_RES_MODELS, **MODA_MODELS}


def rows(num_rows: int = 32, length: int = 11) -> list[dict[str, Tensor]]:
    """Return a small data set."""
    return [{"input_ids": ids, "labels": ids} for ids in random_ids(num_rows, length)]


def training_arguments(folder: Path, *, steps: int = 4, **arguments) -> TrainingArguments:
    """Return arguments for a few steps on a CPU without logging."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{
            "per_device_train_batch_size": 4,
            "learning_rate": LR,
            "weight_decay": DECAY,
            "save_strategy": "no",
            **arguments,
        },
    )


def train(model: nn.Module, folder: Path, data, *, optimizer=None, resume: str | None = None, **arguments) -> Trainer:
    """Run `Trainer`; `optimizer` is one of `OPTIMIZERS`."""
    args = training_arguments(folder, **arguments)
    kwargs = {} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer(args, depth_lr_factor=FACTOR)}
    trainer = Trainer(model, args, train_dataset=data, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def backward(model: nn.Module, ids: Tensor) -> None:
    """Compute the gradients of the loss of one batch."""
    model(input_ids=ids, labels=ids).loss.backward()


def parameters_in(model: nn.Module, *kinds: type[nn.Module]) -> set[int]:
    """Return the ids of the parameters in modules of the given classes."""
    return {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the parameters that differ from `before`."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def assert_same_parameters(model: nn.Module, other: nn.Module) -> None:
    """Assert that all parameters are bit-for-bit equal."""
    assert moved(model, dict(other.named_parameters())) == set()
