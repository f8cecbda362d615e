"""The epsilon of a host's norms, which is that of the depth norms by default; norms with another one."""

from collections.abc import Mapping

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

#: Names of the field in the configs of transformers.
_EPS_FIELDS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
#: Model type -> epsilon of hosts whose norms do not read it from the config.
_CONSTANT_EPS = {"jetmoe": 1e-6, "olmo": 1e-5}


def host_norm_eps(host_config: PreTrainedConfig) -> float:
    """Return the epsilon of the norms in a host's decoder layers.

    Args:
        host_config: the host's config.

    Raises:
        ValueError: if the config has no field for it; the message names the host and the known fields.
    """
    model_type = host_config.model_type
    if model_type in _CONSTANT_EPS:
        return _CONSTANT_EPS[model_type]
    for field in _EPS_FIELDS:
        eps = getattr(host_config, field, None)
        if eps is not None:
            return float(eps)
    raise ValueError(
        f"depth_norm_eps: None is the epsilon of the host's norms, but the config of {model_type!r} has none of the "
        f"fields {', '.join(_EPS_FIELDS)}; give a number."
    )


# Names of the attribute in the norms of transformers and torch.
_EPS_ATTRIBUTES = ("variance_epsilon", "eps")


def set_norm_eps(model: nn.Module, overrides: Mapping[str, float]) -> None:
    """Give norms of a host another epsilon than that of its config.

    Args:
        model: the base model.
        overrides: name of a norm, or the end of the names of several, to their epsilon, such as
            `{"layers.0.input_layernorm": 1e-6, "q_norm": 1e-5}`.

    Raises:
        ValueError: if the model has no module with that name, or one that is not a norm.
    """
    for ending, eps in overrides.items():
        found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{ending}")]
        if not found:
            raise ValueError(f"norm_eps_overrides: the host has no module {ending!r}.")
        for module in found:
            attribute = next((name for name in _EPS_ATTRIBUTES if hasattr(module, name)), None)
            if attribute is None:
                raise ValueError(
                    f"norm_eps_overrides: {ending!r} is a {type(module).__name__}, which has none of the attributes "
                    f"{', '.join(_EPS_ATTRIBUTES)}."
                )
            setattr(module, attribute, float(eps))
