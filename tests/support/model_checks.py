"""Helpers of the model tests: depth models from stock weights, random depth parameters, relative errors."""

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.integrations.trainer import is_depth_name

#: Whether `model.load_adapter` loads the `modules_to_save` of an adapter; before 5.18, not for stock models either.
LOADS_MODULES_TO_SAVE = Version(transformers.__version__) >= Version("5.18")


def is_depth_key(name: str) -> bool:
    """Return whether a parameter was added by depth attention."""
    return is_depth_name(name)


def depth_model(stock: nn.Module, **fields) -> DepthAttnForCausalLM:
    """Build a depth model with the weights of a stock model."""
    dtype = next(stock.parameters()).dtype
    model = DepthAttnForCausalLM(DepthAttnConfig(text_config=stock.config, **fields)).to(dtype).eval()
    result = model.load_state_dict(stock.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(is_depth_key(key) for key in result.missing_keys)
    return model


def randomise_depth(model: nn.Module) -> None:
    """Randomise queries and gates so that depth weights clearly differ from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_depth_key(name):
                size = 0.5 if name.endswith(("query", "gate")) else 0.1
                parameter.add_(torch.randn_like(parameter) * size)


def relative_max_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference divided by the largest expected absolute value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
