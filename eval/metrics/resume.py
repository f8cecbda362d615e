"""Passes that begin at a layer: what lies before a changed layer is the same every time, so it is computed once.

For metrics that change one layer after the other this halves the work, and more where the last layers change. The
numbers are the same, bit for bit: the layers behind read the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .interventions import attribute, first_argument


@contextmanager
def recorded_inputs(layers: nn.ModuleList) -> Iterator[list[Any]]:
    """Collects what each layer is called with, a state `[B, T, D]` or a `DepthState`, during one pass."""
    inputs: list[Any] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(first_argument(args, kwargs))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
        yield inputs


@contextmanager
def resumed_at(layers: nn.ModuleList, index: int, inputs: list[Any], *, as_tuple: bool) -> Iterator[None]:
    """The layers before `index` do not run; that one reads what was recorded.

    Args:
        layers: the decoder layers.
        index: the first layer that runs.
        inputs: of all layers, from `recorded_inputs`.
        as_tuple: layers return tuples.
    """

    def returns(result: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = first_argument(args, kwargs) if result is None else result
            return (output,) if as_tuple else output

        return forward

    with ExitStack() as stack:
        for number in range(index):
            result = inputs[index] if number == index - 1 else None
            stack.enter_context(attribute(layers[number], "forward", returns(result)))
        yield


def can_resume(layers: nn.ModuleList, logits: Callable[[Tensor], Tensor], *, as_tuple: bool) -> bool:
    """Whether all that layers pass on is what they return: some hosts share keys and values beside it.

    Args:
        layers: the decoder layers.
        logits: one pass of the model.
        as_tuple: layers return tuples.
    """
    ids = torch.tensor([[1, 2, 3]])
    with recorded_inputs(layers) as inputs:
        expected = logits(ids)
    if len(inputs) != len(layers):
        return False
    for index in {len(layers) // 2, len(layers) - 1}:
        try:
            with resumed_at(layers, index, inputs, as_tuple=as_tuple):
                found = logits(ids)
        except Exception:
            # Whatever a later layer misses: every pass begins at the first one then.
            return False
        if not torch.equal(found, expected):
            return False
    return True
