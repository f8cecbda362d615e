"""Pipeline stages of a whole model in one process, run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_depthattn.distributed.stage_building import routers_of, stage_from_config
from hf_depthattn.distributed.stage_plan import StagePlan, plan_stages, split_layers


def stages_of(model: nn.Module, num_stages: int, layers: Sequence[range] | None = None) -> list[nn.Module]:
    """Build the stages of a model, with its weights; every boundary carries the whole state."""
    config = model.config
    layers = layers or split_layers(config.host_config.num_hidden_layers, num_stages)
    plans = plan_stages(config, layers, list(range(num_stages)), routers=routers_of(config))
    return [with_weights_of(model, plan) for plan in plans]


def with_weights_of(model: nn.Module, plan: StagePlan) -> nn.Module:
    """Build one stage with the weights of the whole model."""
    stage = stage_from_config(model.config, plan, seed=0).to(next(model.parameters()).dtype)
    state = model.state_dict()
    stage.load_state_dict({name: state[name] for name in stage.state_dict()})
    return stage.train(model.training)


def run(stages: Sequence[nn.Module], input_ids: Tensor, **kwargs) -> Tensor:
    """Return what the last stage returns."""
    tensors: tuple[Tensor, ...] = (input_ids,)
    for stage in stages[:-1]:
        tensors = stage(*tensors, **kwargs)
    return stages[-1](*tensors, **kwargs)


def summed_gradients(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the gradients of all stages by name, those of shared parameters summed; zeros for those without."""
    total: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total[name] = total[name] + gradient if name in total else gradient
    return total


def gradient_errors(stages: Sequence[nn.Module], model: nn.Module) -> dict[str, float]:
    """Return the relative error of every gradient; the stages have the parameters of the model."""
    found = summed_gradients(stages)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            assert not found[name].any(), name
        else:
            errors[name] = ((found[name] - gradient).norm() / gradient.norm()).item()
    return errors
