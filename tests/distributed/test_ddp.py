"""DDP in one gloo process: every parameter has a gradient, so it need not search for unused ones."""

from functools import partial

import pytest
import torch
from tiny_hosts import random_ids
from torch import nn
from training_models import ATTN_RES_MODELS, DECAY, LR, MODA_MODELS, backward

from hf_depthattn import depth_param_groups
from hf_depthattn.integrations.trainer import depth_parameter_names, is_projection_name

#: label -> function that makes a model, whether its gates are open
CASES = {
    **{label: (make_model, True) for label, make_model in ATTN_RES_MODELS.items()},
    **{f"{label}, gates open": (make_model, True) for label, make_model in MODA_MODELS.items()},
    **{f"{label}, gates 0": (partial(make, open_gates=False), False) for label, make in MODA_MODELS.items()},
}


@pytest.mark.parametrize(("make_model", "open_gates"), CASES.values(), ids=CASES)
def test_every_parameter_has_a_gradient(process_group, make_model, open_gates):
    """Where nothing can be learnt it is zero, not none: at site 0, which has one source, and behind closed gates."""
    model, ids = make_model().train(), random_ids(2, 11)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert depth_parameter_names(wrapped) == [f"module.{name}" for name in depth_parameter_names(model)]
    # Closed gates stay closed.
    lr = LR if open_gates else 0.0
    optimizer = torch.optim.AdamW(depth_param_groups(wrapped, lr=lr, weight_decay=DECAY))
    for _ in range(2):
        optimizer.zero_grad()
        backward(wrapped, ids)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if ".layers.0.attn_depth." in name or "depth_reads" in name:
            of_first_site = parameter.grad[0] if "depth_reads" in name else parameter.grad
            assert not of_first_site.any(), name
        if name == "model.depth_reads.query":
            assert parameter.grad[1:].any(dim=-1).all(), name
        if name.endswith(".gate"):
            assert parameter.grad.ne(0).all(), name
        if is_projection_name(name):
            assert bool(parameter.grad.any()) == open_gates, name
