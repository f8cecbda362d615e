"""Configuration of a decoder with depth attention: the host's own config plus the depth connection."""

import math
from enum import StrEnum

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from .host_layouts import HostLayout, host_layout

logger = logging.get_logger(__name__)

#: Number of blocks of the paper (N), used when neither `num_blocks` nor `sublayers_per_block` is given.
DEFAULT_NUM_BLOCKS = 8

# Keys that transformers itself puts into a config.json or passes as keyword arguments, beside the declared fields.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
    }
)

# Switches that the host's forward reads from its own config: setting them on the outer config sets both.
_MIRRORED_ON_HOST = frozenset({"output_attentions", "output_hidden_states"})


# What only AttnRes reads.
_ATTN_RES_FIELDS = (
    "num_blocks",
    "sublayers_per_block",
    "read_scale",
    "query",
    "depth_activation",
    "key_norm",
    "static_mix",
    "num_depth_heads",
    "depth_window",
    "depth_norm_eps",
)


class DepthConnectionType(StrEnum):
    """How a sublayer gets its input and where its output goes; `depth_connections.CONNECTIONS` holds the classes."""

    RESIDUAL = "residual"  #: `ResidualSite`, the host unchanged, for controls
    ATTN_RES = "attn_res"  #: `AttnResSite`, Attention Residuals (arXiv 2603.15031)


class ReadScale(StrEnum):
    """Scale of an AttnRes read."""

    MEAN = "mean"  #: the paper: a convex mix of the sources
    SUM = "sum"  #: the mix times its number of sources: zero queries give the residual sum, which retrofitting needs


class QueryType(StrEnum):
    """Where the query of an AttnRes read comes from."""

    STATIC = "static"  #: a learned vector per site (the paper)
    INPUT = "input"  #: the same plus a projection of the newest source, per token (ablation of the paper)


class DepthActivation(StrEnum):
    """What turns depth scores into weights."""

    SOFTMAX = "softmax"  #: the paper
    SIGMOID = "sigmoid"  #: no competition between sources (ablation of the paper), scaled to the mean at zero scores


def _require_member(field: str, value: str, allowed: type[StrEnum]) -> None:
    if value not in set(allowed):
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(repr(str(member)) for member in allowed)}.")


@strict
class DepthAttnConfig(PreTrainedConfig):
    r"""Configuration of `DepthAttnModel` and its heads.

    Attributes that are missing here resolve on `text_config` (`config.hidden_size`, `config.vocab_size`, ...), and
    setting one of the host's attributes sets it on the host.

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            The host: the config of a decoder that transformers ships, or its dict with `model_type`. Required.
        connection (`str`, defaults to `"attn_res"`):
            `"attn_res"`: Attention Residuals; `"residual"`: the host unchanged, for controls.
        num_blocks (`int`, *optional*):
            Block AttnRes with at most this many blocks (the paper's N), of `ceil(2 L / num_blocks)` sublayers each. 8,
            or the number of sublayers if that is smaller, when neither this nor `sublayers_per_block` is given.
        sublayers_per_block (`int`, *optional*):
            Sublayers (attention or MLP modules, two per decoder layer) in a block; 1 is Full AttnRes. The last block
            may be short. Not together with `num_blocks`.
        read_scale (`str`, defaults to `"mean"`):
            `"mean"` is the paper. `"sum"` multiplies each mix by its number of sources, so that zero queries
            reproduce the host's residual stream exactly: the choice for retrofitted checkpoints.
        query (`str`, defaults to `"static"`):
            `"static"`: one learned vector per site; `"input"`: plus a projection of the newest source of the token.
        depth_activation (`str`, defaults to `"softmax"`):
            `"softmax"` or `"sigmoid"`.
        key_norm (`bool`, defaults to `True`):
            RMS-normalise the keys (values are always raw).
        static_mix (`bool`, defaults to `False`):
            Input-independent mixing: a learned score per source instead of query and key.
        num_depth_heads (`int`, defaults to 1):
            Heads of the depth softmax, each on its slice of `hidden_size`.
        depth_window (`int`, *optional*):
            Read only the embedding and the newest `depth_window` sources. `None` reads all.
        depth_norm_eps (`float`, defaults to 1e-6):
            Epsilon of the key norm.

    Raises:
        ValueError: or the strict-dataclass errors of huggingface_hub, naming field, value and what is allowed.

    Example:

    ```python
    >>> from transformers import LlamaConfig
    >>> from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM

    >>> config = DepthAttnConfig.attn_res(LlamaConfig(num_hidden_layers=12, hidden_size=256), num_blocks=8)
    >>> model = DepthAttnForCausalLM(config)
    ```
    """

    model_type = "depthattn"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]
    has_no_defaults_at_init = True

    text_config: dict | PreTrainedConfig | None = None
    connection: str = "attn_res"
    num_blocks: int | None = None
    sublayers_per_block: int | None = None
    read_scale: str = "mean"
    query: str = "static"
    depth_activation: str = "softmax"
    key_norm: bool = True
    static_mix: bool = False
    num_depth_heads: int = 1
    depth_window: int | None = None
    depth_norm_eps: int | float = 1e-6

    def __post_init__(self, **kwargs):
        host = self._host_config(self.__dict__.pop("text_config", None))
        host_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if self._belongs_to_host(host, key)}
        # What the base class declares too is the host's unless it was given here.
        if self.id2label is None and "num_labels" not in kwargs:
            self.id2label, self.label2id = host.id2label, host.label2id
        for name in ("problem_type", "dtype"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(host, name))
        # The host is attached after the base class has run: before that, the fallback of `__getattr__` would make the
        # base class standardise the host's rotary parameters a second time.
        super().__post_init__(**kwargs)
        self.__dict__["text_config"] = host
        for key, value in host_kwargs.items():
            setattr(host, key, value)
        if self._attn_implementation is not None:
            self._attn_implementation = self._attn_implementation
        if self._experts_implementation is not None:
            self._experts_implementation = self._experts_implementation
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYS - set(type(self).__dataclass_fields__))
        if unknown:
            logger.warning(
                f"DepthAttnConfig: unknown fields {', '.join(unknown)} are kept but have no effect; "
                "they may come from a newer version of hf_depthattn."
            )

    @staticmethod
    def _host_config(host: "dict | PreTrainedConfig | None") -> PreTrainedConfig:
        if isinstance(host, dict):
            host = dict(host)
            model_type = host.pop("model_type", None)
            if model_type is None:
                raise ValueError(
                    "text_config: the dict has no 'model_type'; it must name a model type of transformers."
                )
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config: model_type {model_type!r} is not known to this version of transformers."
                )
            return CONFIG_MAPPING[model_type](**host)
        if not isinstance(host, PreTrainedConfig):
            raise ValueError(
                f"text_config: {host!r} is not a host; give the config of a decoder (or its dict with 'model_type')."
            )
        return host

    @classmethod
    def _belongs_to_host(cls, host: PreTrainedConfig, key: str) -> bool:
        return (
            not key.startswith("_") and key not in _TRANSFORMERS_KEYS and not hasattr(cls, key) and hasattr(host, key)
        )

    def __getattr__(self, name: str):
        host = self.__dict__.get("text_config")
        if host is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(host, name)

    def __setattr__(self, name: str, value):
        host = self.__dict__.get("text_config")
        if isinstance(host, PreTrainedConfig):
            if name == "text_config":
                value = self._host_config(value)
            if name not in self.__dict__ and self._belongs_to_host(host, name):
                setattr(host, name, value)
                return
            if name in _MIRRORED_ON_HOST:
                setattr(host, name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers sets keyword arguments after validation, so `from_pretrained(dir, num_blocks=0)` would pass
        # unseen.
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    @classmethod
    def attn_res(
        cls, host_config: PreTrainedConfig | dict, num_blocks: int | None = None, **kwargs
    ) -> "DepthAttnConfig":
        """Block AttnRes on a host (`num_blocks` as in the class, 8 by default)."""
        return cls(text_config=host_config, connection="attn_res", num_blocks=num_blocks, **kwargs)

    @classmethod
    def full_attn_res(cls, host_config: PreTrainedConfig | dict, **kwargs) -> "DepthAttnConfig":
        """Full AttnRes on a host: every sublayer output is a source of its own."""
        return cls(text_config=host_config, connection="attn_res", sublayers_per_block=1, **kwargs)

    @classmethod
    def residual(cls, host_config: PreTrainedConfig | dict, **kwargs) -> "DepthAttnConfig":
        """The host unchanged behind the same classes: the control of a comparison."""
        return cls(text_config=host_config, connection="residual", **kwargs)

    @property
    def host_layout(self) -> HostLayout:
        """How the host's decoder layers are laid out."""
        return host_layout(self.text_config.model_type)

    @property
    def num_sublayers(self) -> int:
        """Attention and MLP sublayers of the host: `2 * num_hidden_layers`."""
        return 2 * self.text_config.num_hidden_layers

    @property
    def block_size_sublayers(self) -> int:
        """Sublayers per block after defaults are resolved; 1 is Full AttnRes."""
        if self.sublayers_per_block is not None:
            return self.sublayers_per_block
        num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers) if self.num_blocks is None else self.num_blocks
        return -(-self.num_sublayers // num_blocks)

    def num_sources(self, site: int) -> int:
        """Sources that a site can read: finished blocks (the embedding counts as one) and the open block.

        Args:
            site: sublayer number, 0 to `num_sublayers - 1`, or `num_sublayers` for the output site.
        """
        return -(-site // self.block_size_sublayers) + 1

    # --- validation; every `validate_*` runs at the end of `__init__`, in `save_pretrained` and in `from_dict` ---

    def validate_layer_type(self):
        """The host validates its own layer types."""

    def validate_rope(self):
        """The host validates its own rotary parameters."""

    def validate_host(self):
        """The host must be a decoder whose layers fit a known layout."""
        host = self.text_config
        if getattr(host, "num_hidden_layers", 1) < 1:
            raise ValueError(f"text_config: num_hidden_layers {host.num_hidden_layers} must be at least 1.")
        if getattr(host, "is_encoder_decoder", False):
            raise ValueError(
                f"text_config: model_type {host.model_type!r} is an encoder-decoder model; "
                "depth attention needs a decoder-only host."
            )
        host_layout(host.model_type)

    def validate_connection(self):
        """Fields of the depth connection."""
        _require_member("connection", self.connection, DepthConnectionType)
        _require_member("read_scale", self.read_scale, ReadScale)
        _require_member("query", self.query, QueryType)
        _require_member("depth_activation", self.depth_activation, DepthActivation)
        if not 0 < self.depth_norm_eps < math.inf:
            raise ValueError(f"depth_norm_eps: {self.depth_norm_eps} must be greater than 0 and finite.")
        if self.static_mix and self.query != QueryType.STATIC:
            raise ValueError(
                f"query: {self.query!r} has no effect with static_mix=True; only 'static' is allowed with it."
            )

    def validate_effect(self):
        """Warns of settings that the others leave without effect."""
        idle_fields: dict[str, tuple[str, ...]] = {}
        if self.connection == DepthConnectionType.RESIDUAL:
            idle_fields["connection='residual'"] = _ATTN_RES_FIELDS
        elif self.static_mix:
            idle_fields["static_mix=True"] = ("key_norm", "depth_norm_eps")
        for cause, idle in idle_fields.items():
            fields = type(self).__dataclass_fields__
            changed = [name for name in idle if getattr(self, name) != fields[name].default]
            if changed:
                logger.warning_once(f"DepthAttnConfig: {', '.join(changed)} have no effect with {cause}.")

    def validate_blocks(self):
        """Sizes, in sublayers, blocks, heads and sources."""
        if getattr(self.text_config, "num_hidden_layers", 0) < 1:
            return  # `validate_host` says so
        num_sublayers = self.num_sublayers
        if self.num_blocks is not None and self.sublayers_per_block is not None:
            raise ValueError(
                f"num_blocks: {self.num_blocks} and sublayers_per_block: {self.sublayers_per_block} were both given; "
                "give one of them."
            )
        for field in ("num_blocks", "sublayers_per_block"):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= num_sublayers:
                raise ValueError(
                    f"{field}: {value} must be between 1 and {num_sublayers}, the number of sublayers "
                    f"(2 * num_hidden_layers) of the host."
                )
        if self.depth_window is not None:
            if self.depth_window < 1:
                raise ValueError(f"depth_window: {self.depth_window} must be at least 1 source, or None for all.")
            if self.read_scale == ReadScale.SUM:
                raise ValueError(
                    f"depth_window: {self.depth_window} needs read_scale='mean': with 'sum', reads must see every "
                    "source to reproduce the residual stream."
                )
        hidden_size = self.text_config.hidden_size
        if self.num_depth_heads < 1 or hidden_size % self.num_depth_heads:
            raise ValueError(
                f"num_depth_heads: {self.num_depth_heads} must be a positive divisor of hidden_size {hidden_size}."
            )


__all__ = ["DepthAttnConfig"]
