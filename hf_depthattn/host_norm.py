"""The epsilon of a host's norms, which is that of the depth norms by default."""

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
