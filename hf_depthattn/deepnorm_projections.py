"""Which weights of a host DeepNorm scales at initialisation, and on which hosts it cannot."""

from collections.abc import Iterator

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .moda_slot_plan import linear_attention_layers

#: Names of value and output projections in attention modules.
ATTENTION_PROJECTIONS = frozenset({"Wo", "o_proj", "out_proj", "v_proj"})

#: Names of projections in MLPs, of single experts and of the stacked weights of experts; routers are not scaled.
MLP_PROJECTIONS = frozenset(
    {
        "Wi",
        "Wo",
        "c_fc",
        "c_proj",
        "down_proj",
        "fc1",
        "fc2",
        "gate_proj",
        "gate_up_proj",
        "input_linear",
        "output_linear",
        "up_proj",
        "w1",
        "w2",
        "w3",
    }
)

# Hosts with one projection for values and something that is not scaled.
_FUSED_VALUES = frozenset({"jetmoe", "persimmon", "phi3", "phi4_multimodal"})


def scaled_weights(module: nn.Module, names: frozenset[str]) -> Iterator[nn.Parameter]:
    """Yield the matrices of projections in a module of a sublayer.

    Args:
        module: the attention or MLP module.
        names: `ATTENTION_PROJECTIONS` or `MLP_PROJECTIONS`.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and not names.isdisjoint(name.split(".")):
            yield parameter


def why_not_scaled(host_config: PreTrainedConfig) -> str | None:
    """Return why DeepNorm's initialisation is not defined for a host, or `None` if it is.

    Args:
        host_config: the host's config.
    """
    if linear_attention_layers(host_config):
        return "some of its layers have no softmax attention"
    if getattr(host_config, "kv_lora_rank", None) is not None:
        return "keys and values of its attention come from one latent projection"
    if host_config.model_type in _FUSED_VALUES:
        return "its attention has one projection for values and keys"
    return None
