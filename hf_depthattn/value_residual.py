r"""Value residual (ResFormer): attention also uses the values of the first attention layer.

Paper: arXiv 2410.17897. In every attention layer l but the first, at the output of `v_proj`, before the cache:

    v_l = c1_l v_1 + c2_l v_l

    layer 1:  x --> v_proj --> v_1 --> attention
                                |
                  DepthState.first_value, unchanged through all layers
                                |
    layer l:  x --> v_proj --> mix --> attention, cache, slot of MoDA

The attention modules of hosts call `v_proj` themselves, so the mix is a forward hook on it. It is independent of the
connection and of MoDA, whose slots get the mixed values. Layers without softmax attention take no part.

New parameters: 2 per layer. I/O per attention sublayer and token: reading v_1, one row of all key-value heads.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .configuration_depthattn import DepthAttnConfig
from .depth_options import ValueResidualInit
from .depth_state import DepthState
from .float32_module import Float32Module
from .moda_slot_plan import linear_attention_layers
from .parallel_styles import SUMMED_GRADIENTS

#: Name of the module in a decoder layer.
VALUE_RESIDUAL = "value_residual"

#: (c1, c2) of a new model.
_INITIAL_SCALES = {ValueResidualInit.HOST: (0.0, 1.0), ValueResidualInit.RESFORMER: (0.5, 0.5)}


class ValueResidual(Float32Module):
    """The mix of one attention layer, `c1 v_1 + c2 v_l` (arXiv 2410.17897).

    Parameters (float32, never weight-decayed), each `[1]`:
        first_scale: c1, 0 with `value_residual_init="host"`, 0.5 with `"resformer"`.
        own_scale: c2, 1 or 0.5.

    Args:
        config: a config with `value_residual`.
    """

    def __init__(self, config: DepthAttnConfig):
        super().__init__()
        self.initial_scales = _INITIAL_SCALES[ValueResidualInit(config.value_residual_init)]
        first_scale, own_scale = self.initial_scales
        self.first_scale = nn.Parameter(torch.full((1,), first_scale, dtype=torch.float32))
        self.own_scale = nn.Parameter(torch.full((1,), own_scale, dtype=torch.float32))

    def init_parameters(self, init: ModuleType) -> None:
        """Initialise the parameters.

        Args:
            init: the module `transformers.initialization`.
        """
        for parameter, scale in zip((self.first_scale, self.own_scale), self.initial_scales, strict=True):
            init.constant_(parameter, scale)

    def forward(self, value: Tensor, first_value: Tensor) -> Tensor:
        """Return the mixed values in the dtype of `value`.

        Args:
            value: the output of the layer's `v_proj`, `[B, T, Hk dv]`.
            first_value: that of the first attention layer.
        """
        return (self.first_scale * first_value + self.own_scale * value).to(value.dtype)


class ValueExchange:
    """What `v_proj` needs for one call, and what it returns.

    Attributes:
        mix: the layer's `ValueResidual`; `None` in the first attention layer.
        first_value: the output of the first attention layer's `v_proj`; set by the call in that layer.
        has_run: whether `v_proj` has been called.
    """

    def __init__(self, mix: ValueResidual | None, first_value: Tensor | None):
        self.mix = mix
        self.first_value = first_value
        self.has_run = False


def value_residual_module(config: DepthAttnConfig, layer_idx: int) -> ValueResidual | None:
    """Return the module of a decoder layer: one in every attention layer but the first, with `value_residual`.

    Args:
        config: the model's config.
        layer_idx: index of the layer.
    """
    return ValueResidual(config) if layer_idx in value_layers(config)[1:] else None


def value_layers(config: DepthAttnConfig) -> list[int]:
    """Return the indices of the layers that take part; none without `value_residual`.

    Args:
        config: the model's config.
    """
    if not config.value_residual:
        return []
    without_attention = linear_attention_layers(config.host_config)
    return [layer for layer in range(config.host_config.num_hidden_layers) if layer not in without_attention]


def value_residual_tp_plan(config: DepthAttnConfig, host_plan: dict[str, str]) -> dict[str, str]:
    """Return the tensor-parallel plan of the factors, which follows that of the host's value projection.

    Args:
        config: the model's config.
        host_plan: the plan of the host's base model.
    """
    if not config.value_residual or host_plan.get("layers.*.self_attn.v_proj") != "colwise":
        return {}
    # Every device mixes the values of its own heads, so that its gradient of the factors is a part of the sum.
    return {f"layers.*.{VALUE_RESIDUAL}": SUMMED_GRADIENTS}


def share_values(
    attend: Callable[[], Any], attention: nn.Module, state: DepthState, mix: ValueResidual | None
) -> tuple[Any, DepthState]:
    """Call an attention module with mixed values, and return its output and the state with the first values.

    Args:
        attend: function that calls the attention module.
        attention: the attention module of a layer that takes part.
        state: the depth state.
        mix: the layer's `ValueResidual`; `None` in the first attention layer.

    Raises:
        RuntimeError: if the attention module does not call its `v_proj`.
    """
    v_proj = cast(nn.Module, attention.v_proj)
    prepare_values(v_proj)
    exchange = ValueExchange(mix, state.first_value)
    # To torch's types, every attribute is a tensor or a module.
    v_proj.value_exchange = exchange  # type: ignore[assignment]
    try:
        output = attend()
    finally:
        v_proj.value_exchange = None  # type: ignore[assignment]
    if not exchange.has_run:
        raise RuntimeError(
            f"value_residual: {type(attention).__name__} has not called its v_proj ({type(v_proj).__name__}); its "
            "forward may have been replaced by another library."
        )
    return output, state._replace(first_value=exchange.first_value)


def prepare_values(v_proj: nn.Module) -> None:
    """Add the hook to a `v_proj` without it; PEFT and quantizers replace the module after construction.

    Args:
        v_proj: the value projection of a layer that takes part.
    """
    if _mixed not in v_proj._forward_hooks.values():
        v_proj.value_exchange = None  # type: ignore[assignment]
        v_proj.register_forward_hook(_mixed)


def _mixed(v_proj: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    exchange = cast(ValueExchange | None, v_proj.value_exchange)
    # A module within PEFT's wrapper, or a call that is not the layer's.
    if exchange is None:
        return None
    exchange.has_run = True
    if exchange.mix is None:
        exchange.first_value = output
        return None
    return exchange.mix(output, exchange.first_value)
