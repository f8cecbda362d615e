"""Hooks that see states, and inputs and outputs of sublayers. `probe` says what the states of a model are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from . import interventions
from .sublayers import Sublayer

#: Called with the index of a state and the state `[B, T, D]`, or `[B, T, n D]` with n streams.
StateCallback = Callable[[int, Tensor], None]
#: Called with a sublayer, its input h and its output y, each `[B, T, D]`.
SublayerCallback = Callable[[Sublayer, Tensor, Tensor], None]


@contextmanager
def stream(layers: nn.ModuleList, callback: StateCallback) -> Iterator[None]:
    """Call `callback(l, z_l)` with the stream before each layer and after the last, in layers of transformers.

    Args:
        layers: the decoder layers.
        callback: what is called.
    """
    with ExitStack() as stack:
        stack.enter_context(layers[0].register_forward_pre_hook(_sees_input(callback), with_kwargs=True))
        for index, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_hook(_sees_output(index + 1, callback)))
        yield


@contextmanager
def reads(layers: nn.ModuleList, callback: StateCallback) -> Iterator[None]:
    """Call `callback(l, z_l)` with what the attention site of each layer reads, and with the output of the last.

    Args:
        layers: the decoder layers, with depth sites.
        callback: what is called.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(layer.attn_depth.register_forward_hook(_sees_read(index, callback)))
        stack.enter_context(layers[-1].register_forward_hook(_sees_output(len(layers), callback)))
        yield


@contextmanager
def streams(layers: nn.ModuleList, callback: StateCallback) -> Iterator[None]:
    """Call `callback(l, z_l)` with the n streams before each layer and after the last, each as one [B, T, n D].

    Args:
        layers: the decoder layers, with depth sites that pass on streams.
        callback: what is called.
    """
    last: list[Tensor] = []

    def see_last(site: nn.Module, args: tuple[Any, ...]) -> None:
        last[:] = [args[0].partial.flatten(2)]

    def see_end(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A changed last layer calls the output site twice; the second call counts.
        callback(len(layers), last.pop())

    def sees(index: int) -> Callable[..., None]:
        def hook(site: nn.Module, args: tuple[Any, ...]) -> None:
            callback(index, args[0].partial.flatten(2))

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(layer.attn_depth.register_forward_pre_hook(sees(index)))
        stack.enter_context(layers[-1].out_depth.register_forward_pre_hook(see_last))
        stack.enter_context(layers[-1].register_forward_hook(see_end))
        yield


@contextmanager
def sublayers(found: Iterable[Sublayer], callback: SublayerCallback) -> Iterator[None]:
    """Call `callback(sublayer, h, y)` with input and output of every sublayer.

    Args:
        found: the sublayers.
        callback: what is called.
    """
    inputs: dict[Sublayer, Tensor] = {}
    with ExitStack() as stack:
        for sublayer in found:

            def see_input(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sublayer: Sublayer = sublayer
            ) -> None:
                inputs[sublayer] = interventions.first_argument(args, kwargs)

            def see_output(
                module: nn.Module, args: tuple[Any, ...], output: Any, sublayer: Sublayer = sublayer
            ) -> None:
                output = output[0] if isinstance(output, tuple) else output
                callback(sublayer, inputs.pop(sublayer), output * sublayer.scale)

            stack.enter_context(sublayer.input_module.register_forward_pre_hook(see_input, with_kwargs=True))
            stack.enter_context(sublayer.output_module.register_forward_hook(see_output))
        yield


def _sees_read(index: int, callback: StateCallback) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        callback(index, output[0])

    return hook


def _sees_input(callback: StateCallback) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        callback(0, interventions.first_argument(args, kwargs))

    return hook


def _sees_output(index: int, callback: StateCallback) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        callback(index, output[0] if isinstance(output, tuple) else output)

    return hook
