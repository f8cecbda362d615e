"""What tests of metrics share: a tiny llama, a text, and the states and sublayers of the llama run layer by layer."""

from __future__ import annotations

import pytest
import torch
from depth_metric_models import run_by_hand, sublayers_by_hand
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor, nn

from hf_depthattn.eval.metrics.probing.text import TextBatches


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_stock_model("llama")


@pytest.fixture(scope="module")
def text() -> TextBatches:
    torch.manual_seed(1)
    return TextBatches(random_ids(5, 12), batch_size=2)


@pytest.fixture(scope="module")
def states(model: nn.Module, text: TextBatches) -> list[Tensor]:
    """States before and behind the layers, in float64."""
    with torch.no_grad():
        return [state.double() for state in run_by_hand(model, text.ids)[0]]


@pytest.fixture(scope="module")
def sublayers(model: nn.Module, text: TextBatches) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of the sublayers, in float64."""
    with torch.no_grad():
        return [(x.double(), y.double()) for x, y in sublayers_by_hand(model, text.ids)]
