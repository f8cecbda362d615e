"""Helpers of the PEFT tests: models, a few training steps, and the modules with an adapter."""

import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import tiny_stock_model
from torch import Tensor, nn

from hf_depthattn import DepthAttnForCausalLM, depth_param_groups

peft = pytest.importorskip("peft")


def zero_query_model(stock: nn.Module, **fields) -> DepthAttnForCausalLM:
    """Build a model with AttnRes and zero queries, as after a retrofit."""
    return depth_model(stock, sublayers_per_block=2, read_scale="sum", **fields)


def small_model(host: str = "llama", stock: nn.Module | None = None, **fields) -> DepthAttnForCausalLM:
    """Build a model with AttnRes and random depth parameters."""
    model = zero_query_model(stock or tiny_stock_model(host), **fields)
    randomise_depth(model)
    return model


def randomise_adapter(model: nn.Module) -> None:
    """Randomise the trainable parameters of an adapter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def train_steps(model: nn.Module, ids: Tensor, num_steps: int = 3) -> None:
    """Train for a few steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW(depth_param_groups(model, lr=1e-2, weight_decay=0.1, depth_lr_factor=5.0))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits in eval mode."""
    return model.eval()(input_ids=ids).logits


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules with LoRA."""
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
