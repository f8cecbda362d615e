"""Find the modules where sublayers read from and write to the residual stream, in stock models and in ours.

A sublayer is `y = scale * dropout(post_norm(module(pre_norm(h))))`. Its input h is the input of `pre_norm`, or of the
module if there is no `pre_norm`; its output y is the output of the last of these modules times the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from ....host_layouts import SublayerLayout, host_layout

#: Layouts of stock models that are not supported as hosts of depth attention.
_OTHER_LAYOUTS: dict[str, dict[str, SublayerLayout]] = {
    "gpt2": {
        "attn": SublayerLayout("attn", pre_norm="ln_1"),
        "mlp": SublayerLayout("mlp", pre_norm="ln_2"),
    },
    "gpt_neox": {
        "attn": SublayerLayout("attention", pre_norm="input_layernorm", dropout="post_attention_dropout"),
        "mlp": SublayerLayout("mlp", pre_norm="post_attention_layernorm", dropout="post_mlp_dropout"),
    },
    "mamba": {"mixer": SublayerLayout("mixer", pre_norm="norm")},
    "mamba2": {"mixer": SublayerLayout("mixer", pre_norm="norm")},
}


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sublayer of a model.

    Attributes:
        kind: `"attn"`, `"mlp"` or `"mixer"`.
        layer: index of its decoder layer.
        input_module: module that is called with h.
        output_module: module that returns y / scale, or a tuple that starts with it.
        scale: factor from the output of `output_module` to y.
    """

    kind: str
    layer: int
    input_module: nn.Module
    output_module: nn.Module
    scale: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.layer}"


def find_sublayers(config: PreTrainedConfig, layers: nn.ModuleList) -> list[Sublayer]:
    """Return the sublayers of a model in execution order.

    Args:
        config: the model's config.
        layers: its decoder layers.

    Raises:
        ValueError: if the model type is unsupported, or a layer lacks an expected module.
    """
    layout = _layout(config)
    return [
        _sublayer(kind, index, layer, parts) for index, layer in enumerate(layers) for kind, parts in layout.items()
    ]


def _layout(config: PreTrainedConfig) -> dict[str, SublayerLayout]:
    # Depth models have their own layout, which differs from the host's with norm_position="post".
    layout = getattr(config, "host_layout", None)
    if layout is None:
        model_type = config.get_text_config().model_type
        if model_type in _OTHER_LAYOUTS:
            return _OTHER_LAYOUTS[model_type]
        try:
            layout = host_layout(model_type)
        except ValueError as error:
            raise ValueError(
                f"model_type: sublayer metrics do not support {model_type!r}; metrics of whole layers do"
            ) from error
    return {"attn": layout.attention, "mlp": layout.mlp}


def _sublayer(kind: str, index: int, layer: nn.Module, parts: SublayerLayout) -> Sublayer:
    if parts.companion is not None and getattr(layer, parts.companion, None) is not None:
        raise ValueError(
            f"layer {index}: {type(layer).__name__} adds the outputs of {parts.module} and {parts.companion}; "
            "sublayer metrics do not support this, metrics of whole layers do"
        )
    names = [parts.pre_norm, parts.module_in(layer), parts.post_norm, parts.dropout]
    present = [name for name in names if name is not None]
    missing = [name for name in present if not isinstance(getattr(layer, name, None), nn.Module)]
    if missing:
        raise ValueError(
            f"layer {index}: {type(layer).__name__} has no {', '.join(missing)}; cannot find its sublayers"
        )
    scale = 1.0 if parts.scale is None else float(getattr(layer, parts.scale))
    return Sublayer(kind, index, getattr(layer, present[0]), getattr(layer, present[-1]), scale)
