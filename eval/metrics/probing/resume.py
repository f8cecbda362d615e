"""Forward passes that start at a later layer, since layers before a changed one always return the same states.

For metrics that change each layer in turn this halves the work, or more if only the last layers change. The numbers
are bit-for-bit the same, since later layers read the same tensors.
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
    """Record the input of each layer, a tensor `[B, T, D]` or a `DepthState`, during one pass."""
    inputs: list[Any] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(first_argument(args, kwargs))

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
        yield inputs


@contextmanager
def resumed_at(layers: nn.ModuleList, index: int, inputs: list[Any], *, as_tuple: bool) -> Iterator[None]:
    """Skip the layers before `index`, which reads its recorded input instead.

    Args:
        layers: the decoder layers.
        index: the first layer that runs.
        inputs: inputs of all layers from `recorded_inputs`.
        as_tuple: whether layers return tuples.
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
    """Return whether passes can be resumed; not if layers share more than their outputs, e.g. keys and values.

    Args:
        layers: the decoder layers.
        logits: forward pass of the model.
        as_tuple: whether layers return tuples.
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
            # A later layer misses something: start every pass at the first layer.
            return False
        if not torch.equal(found, expected):
            return False
    return True
