"""Configuration of a decoder with depth attention: the host's own config plus the options of depth attention."""

import math
import os

import transformers
from packaging.version import Version

# Checked before the imports below, which older versions do not support. As remote code those versions would fail later
# with an unrelated error, because they download only some of the files.
_OLDEST_TRANSFORMERS = "5.16"
if Version(transformers.__version__).release < Version(_OLDEST_TRANSFORMERS).release:
    raise ImportError(
        f"Models of the type 'depthattn' need transformers {_OLDEST_TRANSFORMERS} or newer, and "
        f"{transformers.__version__} is installed. Update it: pip install -U 'transformers>={_OLDEST_TRANSFORMERS}'"
    )

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from .deepnorm_projections import why_not_scaled
from .depth_options import (
    DEPTH_OPTIONS,
    AttnResSchedule,
    DepthConnectionType,
    DepthKeyNormType,
    DepthKVType,
    DepthOptions,
    NormPosition,
    QueryType,
    ReadScale,
    StreamMix,
    describe_options,
    option_default,
    replace_options,
    require_member,
)
from .host_attention import REFUSED_DEPTH_KV, REFUSED_VALUE_RESIDUAL, host_attention
from .host_layouts import HostLayout, host_layout, post_norm_layout, require_sequential
from .host_norm import host_norm_eps
from .moda_slot_plan import DepthSlotPlan, check_depth_slots, linear_attention_layers, plan_depth_slots
from .remote_code import saved_with_code, without_code

logger = logging.get_logger(__name__)

#: Number of blocks (N) recommended by the paper, which the default size of blocks approximates.
DEFAULT_NUM_BLOCKS = 8

# Connections that need norms before sublayers, and those that work with norms after the sums.
_NEED_PRE_NORM = frozenset({DepthConnectionType.LAYER_NORM_SCALING, DepthConnectionType.KEEL})
_ALLOW_POST_NORM = frozenset({DepthConnectionType.RESIDUAL, DepthConnectionType.DEEPNORM})
#: Largest number of streams of mHC-lite, which has n! weights for n streams: 24 for 4, 120 for 5.
MAX_PERMUTED_STREAMS = 4
_BLOCK_FIELDS = ("num_blocks", "sublayers_per_block")

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

# Options of AttnRes without an effect beside `static_mix`, which has no keys.
_KEY_OPTIONS = ("key_norm", "depth_norm_eps")

# Flags that the host's forward reads from its own config: setting them on the outer config sets both.
_MIRRORED_ON_HOST = frozenset({"output_attentions", "output_hidden_states"})


@strict
class DepthAttnConfig(DepthOptions, PreTrainedConfig):
    r"""Configuration of `DepthAttnModel` and of the models with a head, such as `DepthAttnForCausalLM`.

    Attributes that are not defined here are read from and set on the host's config, `text_config`
    (`config.hidden_size`, `config.vocab_size`, ...).

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            The config of the host, a decoder that transformers ships, or its dict with `model_type`. Required.
        {options}

    Raises:
        ValueError: if a value is not allowed; the message names the field, its value and the allowed values.
            Values of the wrong type raise the strict-dataclass errors of huggingface_hub.

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
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    has_no_defaults_at_init = True

    text_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        host = self._host_config(self.__dict__.pop("text_config", None))
        host_kwargs = {key: kwargs.pop(key) for key in list(kwargs) if self._belongs_to_host(host, key)}
        # Fields that the base class declares as well default to the host's values.
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
        known = {*_TRANSFORMERS_KEYS, *type(self).__dataclass_fields__, "attn_res_schedule"}
        unknown = sorted(set(kwargs) - known)
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
                    "text_config: the dict has no 'model_type'; add the model type of a decoder in transformers."
                )
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config: model_type {model_type!r} is not known to the installed version of transformers."
                )
            return CONFIG_MAPPING[model_type](**host)
        if not isinstance(host, PreTrainedConfig):
            raise ValueError(
                f"text_config: {host!r} is not a config; pass the config of a decoder, or its dict with 'model_type'."
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

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save the config and the model code, so that the folder loads with `trust_remote_code=True`.

        Arguments are those of `PreTrainedConfig.save_pretrained`.
        """
        with saved_with_code(self, save_directory):
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # Further arguments differ between versions of transformers.
    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):  # type: ignore[override]
        return super()._upload_modified_files(working_dir, repo_id, without_code(files_timestamps), **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = replace_options(config_dict, kwargs)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        saved_connection = config_dict.get("connection", option_default("connection"))
        had_blocks = DEPTH_OPTIONS["sublayers_per_block"].has_effect(saved_connection, None)
        if had_blocks and config.has_blocks and config_dict.get("sublayers_per_block", ...) is None:
            config._set_block_size_of_older_version()
        # transformers applies keyword arguments after validation: `from_pretrained(dir, num_blocks=0)` would not be
        # rejected.
        config.validate()
        return result

    def _set_block_size_of_older_version(self) -> None:
        # Versions that saved no size did not round blocks to whole layers.
        num_blocks = min(DEFAULT_NUM_BLOCKS, self.num_sublayers) if self.num_blocks is None else self.num_blocks
        self.num_blocks, self.sublayers_per_block = None, -(-self.num_sublayers // num_blocks)

    @classmethod
    def attn_res(
        cls, host_config: PreTrainedConfig | dict, num_blocks: int | None = None, **kwargs
    ) -> "DepthAttnConfig":
        """Return a config with Block AttnRes (arXiv 2603.15031, section 3.2).

        Args:
            host_config: the config of the host.
            num_blocks: maximum number of blocks; about 8 blocks of whole layers by default.
            **kwargs: other fields of `DepthAttnConfig`.
        """
        return cls(text_config=host_config, connection="attn_res", num_blocks=num_blocks, **kwargs)

    @classmethod
    def full_attn_res(cls, host_config: PreTrainedConfig | dict, **kwargs) -> "DepthAttnConfig":
        """Return a config with Full AttnRes, in which every sublayer output is a source of its own (section 3.1).

        Args:
            host_config: the config of the host.
            **kwargs: other fields of `DepthAttnConfig`.
        """
        return cls(text_config=host_config, connection="attn_res", sublayers_per_block=1, **kwargs)

    @classmethod
    def residual(cls, host_config: PreTrainedConfig | dict, **kwargs) -> "DepthAttnConfig":
        """Return a config with the host's residual stream: a baseline, the unchanged host in our classes.

        Args:
            host_config: the config of the host.
            **kwargs: other fields of `DepthAttnConfig`.
        """
        return cls(text_config=host_config, connection="residual", **kwargs)

    @classmethod
    def moda(
        cls, host_config: PreTrainedConfig | dict, depth_kv: str = "attention+mlp", **kwargs
    ) -> "DepthAttnConfig":
        """Return a config with Mixture-of-Depths Attention (arXiv 2603.15619) and the host's residual stream.

        Args:
            host_config: the config of the host.
            depth_kv: which sublayers write depth slots, "attention" or "attention+mlp".
            **kwargs: other fields of `DepthAttnConfig`; `connection="attn_res"` combines MoDA with AttnRes.
        """
        return cls(text_config=host_config, depth_kv=depth_kv, **{"connection": "residual", **kwargs})

    def to_dict(self) -> dict:
        """Return the config as a dict, with `tie_word_embeddings` at the top level too, where PEFT reads it.

        The size of blocks is in `sublayers_per_block`, whether given or a default.
        """
        output = super().to_dict()
        output.pop("_attn_res_schedule", None)
        if self.text_config is not None:
            if self.has_blocks and self.num_blocks != 0:
                # The size alone, so that a checkpoint does not depend on how a version rounds.
                output |= {"num_blocks": None, "sublayers_per_block": self.block_size_sublayers}
            output["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
            from .peft_targets import register_default_targets

            # PEFT takes the model type from this dict and then looks up its default targets.
            register_default_targets(self.model_type, self.text_config.model_type)
        return output

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "DepthAttnConfig":
        """Return this config, which has the attributes of its host; transformers would return `text_config`.

        Engines take a model whose config is not its own text config for a multimodal one.
        """
        return self

    # transformers has class variables here, which it only reads.
    @property
    def base_model_tp_plan(self) -> dict | None:  # type: ignore[override]
        """The host's tensor-parallel plan."""
        return self.text_config.base_model_tp_plan

    @property
    def base_model_ep_plan(self) -> dict | None:  # type: ignore[override]
        """The host's expert-parallel plan."""
        return self.text_config.base_model_ep_plan

    @property
    def base_model_fsdp_plan(self) -> dict | None:  # type: ignore[override]
        """The host's FSDP2 plan."""
        return getattr(self.text_config, "base_model_fsdp_plan", None)

    @property
    def attn_res_schedule(self) -> str:
        """The `AttnResSchedule` of AttnRes reads, `"auto"` by default.

        It can be set at any time and is never saved, as it does not change the function of the model.
        """
        return self.__dict__.get("_attn_res_schedule", AttnResSchedule.AUTO)

    @attn_res_schedule.setter
    def attn_res_schedule(self, value: str) -> None:
        require_member("attn_res_schedule", value, AttnResSchedule)
        self.__dict__["_attn_res_schedule"] = AttnResSchedule(value)

    @property
    def host_config(self) -> PreTrainedConfig:
        """The host's config, `text_config`, which is never a dict after initialisation."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config

    @property
    def host_layout(self) -> HostLayout:
        """The layout of the host's decoder layers."""
        layout = host_layout(self.text_config.model_type)
        post_norm = post_norm_layout(layout) if self.norm_position == NormPosition.POST else None
        return layout if post_norm is None else post_norm

    @property
    def depth_slot_plan(self) -> DepthSlotPlan:
        """Which sublayers write depth slots, and which of them each layer reads."""
        return plan_depth_slots(self.host_config, self.depth_kv, self.num_depth_slots, self.depth_slots)

    @property
    def num_sublayers(self) -> int:
        """Number of attention and MLP sublayers of the host: `2 * num_hidden_layers`."""
        return 2 * self.text_config.num_hidden_layers

    @property
    def changes_attention(self) -> bool:
        """Whether attention computes something else than in the host, so that no other engine can run it."""
        return self.depth_kv is not None or self.value_residual

    @property
    def resolved_depth_norm_eps(self) -> float:
        """Epsilon of depth norms: `depth_norm_eps`, or that of the host's norms."""
        return host_norm_eps(self.host_config) if self.depth_norm_eps is None else float(self.depth_norm_eps)

    @property
    def has_blocks(self) -> bool:
        """Whether the connection has blocks."""
        return DEPTH_OPTIONS["sublayers_per_block"].has_effect(self.connection, self.depth_kv)

    @property
    def block_size_sublayers(self) -> int:
        """Number of sublayers per block, with defaults resolved; 1 is Full AttnRes.

        Blocks are whole decoder layers, as in Kimi K3 and flash-linear-attention, unless `sublayers_per_block` is odd
        or `num_blocks` is `2 * num_hidden_layers`.
        """
        if self.sublayers_per_block is not None:
            return self.sublayers_per_block
        num_layers = self.text_config.num_hidden_layers
        if self.num_blocks is None:
            # The nearest number of layers: at 27 layers 3, as in the paper.
            return 2 * max(1, (2 * num_layers + DEFAULT_NUM_BLOCKS) // (2 * DEFAULT_NUM_BLOCKS))
        if self.num_blocks > num_layers:
            return -(-self.num_sublayers // self.num_blocks)
        return 2 * -(-num_layers // self.num_blocks)

    def num_sources(self, site: int) -> int:
        """Return the number of sources at a site with AttnRes, before `depth_window`.

        These are the embedding, finished blocks and the open block.

        Args:
            site: sublayer number, 0 to `num_sublayers - 1`, or `num_sublayers` for the output site.
        """
        return -(-site // self.block_size_sublayers) + 1

    # --- validation; every `validate_*` runs at the end of `__init__`, in `save_pretrained` and in `from_dict` ---

    def validate_choices(self):
        """Check the options whose values are enumerated."""
        for name, option in DEPTH_OPTIONS.items():
            value = getattr(self, name)
            if option.choices is not None and not (value is None and option_default(name) is None):
                require_member(name, value, option.choices)

    def validate_architecture(self):
        """Do nothing: the host validates its own sizes, which may differ between its layers."""

    def validate_layer_type(self):
        """Do nothing: the host validates its own layer types."""

    def validate_rope(self):
        """Do nothing: the host validates its own rotary parameters."""

    def validate_host(self):
        """Check that the host is a decoder and that its layers have a known layout."""
        host = self.host_config
        if getattr(host, "num_hidden_layers", 1) < 1:
            raise ValueError(f"text_config: num_hidden_layers {host.num_hidden_layers} must be at least 1.")
        if getattr(host, "is_encoder_decoder", False):
            raise ValueError(
                f"text_config: model_type {host.model_type!r} is an encoder-decoder model; "
                "depth attention needs a decoder-only host."
            )
        host_layout(host.model_type, is_wrapper="text_config" in type(host).sub_configs)
        require_sequential(host)
        if self.depth_norm_eps is None and DEPTH_OPTIONS["depth_norm_eps"].has_effect(self.connection, self.depth_kv):
            host_norm_eps(host)

    def validate_connection(self):
        """Check the fields of the depth connection."""
        if self.depth_norm_eps is not None and not 0 < self.depth_norm_eps < math.inf:
            raise ValueError(f"depth_norm_eps: {self.depth_norm_eps} must be greater than 0 and finite, or None.")
        if self.static_mix and self.query != QueryType.STATIC:
            raise ValueError(
                f"query: {self.query!r} has no effect with static_mix=True; only 'static' is allowed with it."
            )

    def validate_comparators(self):
        """Check the fields of the connections that scale, gate or drop, and what they need from the host."""
        if self.branch_scale_init is not None and not math.isfinite(self.branch_scale_init):
            raise ValueError(f"branch_scale_init: {self.branch_scale_init} must be finite, or None for the paper's.")
        if not math.isfinite(self.highway_bias_init):
            raise ValueError(f"highway_bias_init: {self.highway_bias_init} must be finite.")
        if not 0 <= self.layer_drop < 1:
            raise ValueError(f"layer_drop: {self.layer_drop} must be at least 0 and less than 1.")
        host_type = self.host_config.model_type
        if self.connection in _NEED_PRE_NORM:
            sublayers = (self.host_layout.attention, self.host_layout.mlp)
            if any(sublayer.pre_norm is None for sublayer in sublayers):
                raise ValueError(
                    f"connection: {str(self.connection)!r} needs a host with norms before its sublayers, but "
                    f"{host_type!r} has the layout {self.host_layout.name!r}."
                )
            if any(sublayer.post_norm is not None for sublayer in sublayers):
                logger.warning_once(
                    f"DepthAttnConfig: {host_type!r} also has norms after its sublayers, so "
                    f"connection={str(self.connection)!r} is not the scheme of its paper."
                )
        if self.connection == DepthConnectionType.DEEPNORM and (reason := why_not_scaled(self.host_config)):
            raise ValueError(
                f"connection: 'deepnorm' is not possible on {host_type!r}: its initialisation scales values but not "
                f"keys, and {reason}."
            )

    def validate_streams(self):
        """Check the number of streams and of Sinkhorn iterations."""
        is_lite = self.connection == DepthConnectionType.MHC_LITE
        if self.num_streams < 2:
            raise ValueError(
                f"num_streams: {self.num_streams} must be at least 2; for one stream use connection='residual'."
            )
        if is_lite and self.num_streams > MAX_PERMUTED_STREAMS:
            raise ValueError(
                f"num_streams: {self.num_streams} must be at most {MAX_PERMUTED_STREAMS} with connection='mhc_lite', "
                "which has one weight for each order of the streams; use connection='mhc' for more."
            )
        if self.sinkhorn_iters < 1:
            raise ValueError(f"sinkhorn_iters: {self.sinkhorn_iters} must be at least 1.")

    def validate_depth_kv(self):
        """Check the fields of MoDA."""
        if self.num_depth_slots is not None and self.num_depth_slots < 1:
            raise ValueError(f"num_depth_slots: {self.num_depth_slots} must be at least 1, or None for all slots.")
        if self.num_depth_slots is not None and self.depth_slots is not None:
            raise ValueError(
                f"num_depth_slots: {self.num_depth_slots} and depth_slots: {self.depth_slots} were both given; give "
                "only one of them."
            )
        if self.depth_kv is None:
            return
        host = self.host_config
        if self.depth_slots is not None:
            check_depth_slots(host, self.depth_kv, self.depth_slots)
            if not any(self.depth_slots):
                raise ValueError(
                    f"depth_slots: {self.depth_slots} has no slot for any layer, so depth_kv={str(self.depth_kv)!r} "
                    "has no effect; list a slot for at least one layer, or use depth_kv=None."
                )
        if host.model_type in REFUSED_DEPTH_KV:
            raise ValueError(
                f"depth_kv: {self.depth_kv!r} is not possible on {host.model_type!r}: "
                f"{REFUSED_DEPTH_KV[host.model_type]}."
            )
        if len(linear_attention_layers(host)) == host.num_hidden_layers:
            raise ValueError(f"depth_kv: {self.depth_kv!r} needs a host with at least one softmax attention layer.")
        if self.depth_key_norm == DepthKeyNormType.READER and getattr(host, "clip_qkv", None) is not None:
            raise ValueError(
                f"depth_key_norm: 'reader' is not possible on a host with clip_qkv={host.clip_qkv}, which clips keys "
                "after their norm; use 'writer'."
            )
        if self.depth_key_norm == DepthKeyNormType.READER and host_attention(host.model_type).fuses_projections:
            raise ValueError(
                f"depth_key_norm: 'reader' is not possible on {host.model_type!r}, which has one projection for "
                "queries, keys and values; use 'writer'."
            )
        if host_attention(host.model_type).norms_after_rotation:
            for field in ("depth_key_rope", "depth_key_norm"):
                if getattr(self, field) != option_default(field):
                    raise ValueError(
                        f"{field}: {getattr(self, field)!r} is not possible on {host.model_type!r}, which normalises "
                        f"keys after rotating them; use {option_default(field)!r}."
                    )

    def validate_value_residual(self):
        """Check that the host's attention layers have values of their own, all of one shape."""
        if not self.value_residual:
            return
        host = self.host_config
        if host.model_type in REFUSED_VALUE_RESIDUAL:
            raise ValueError(
                f"value_residual: True is not possible on {host.model_type!r}: "
                f"{REFUSED_VALUE_RESIDUAL[host.model_type]}."
            )
        num_attention = host.num_hidden_layers - len(linear_attention_layers(host))
        if num_attention < 2:
            raise ValueError(
                f"value_residual: True needs a host with at least two softmax attention layers, not {num_attention}."
            )

    def validate_norm_position(self):
        """Check that post-norm is used on a pre-norm host, and only with a residual stream."""
        if self.norm_position != NormPosition.POST:
            if self.connection == DepthConnectionType.DEEPNORM:
                raise ValueError(
                    f"norm_position: {str(self.norm_position)!r} is not possible with connection='deepnorm', whose "
                    "norms come after the sums; use norm_position='post'."
                )
            return
        if self.connection not in _ALLOW_POST_NORM:
            raise ValueError(
                f"norm_position: 'post' normalises the residual stream, which connection={str(self.connection)!r} "
                "changes; use connection='residual' or 'deepnorm'."
            )
        layout = host_layout(self.text_config.model_type)
        if post_norm_layout(layout) is None:
            raise ValueError(
                f"norm_position: 'post' needs a pre-norm host, but {self.text_config.model_type!r} has the layout "
                f"{layout.name!r}."
            )

    def validate_effect(self):
        """Warn about options that have no effect because of other options."""
        idle_options: dict[str, list[str]] = {}
        for name, option in DEPTH_OPTIONS.items():
            if getattr(self, name) == option_default(name):
                continue
            if not option.has_effect(self.connection, DepthKVType.ATTENTION):
                idle_options.setdefault(f"connection={str(self.connection)!r}", []).append(name)
            elif not option.has_effect(self.connection, self.depth_kv):
                idle_options.setdefault("depth_kv=None", []).append(name)
            elif self.connection == DepthConnectionType.ATTN_RES and self.static_mix and name in _KEY_OPTIONS:
                idle_options.setdefault("static_mix=True", []).append(name)
            elif name == "depth_norm_eps" and (cause := self._why_without_norm()) is not None:
                idle_options.setdefault(cause, []).append(name)
            elif not self.value_residual and name == "value_residual_init":
                idle_options.setdefault("value_residual=False", []).append(name)
            elif name == "depth_kv_bias" and self.depth_kv == DepthKVType.ATTENTION:
                idle_options.setdefault(f"depth_kv={str(self.depth_kv)!r}", []).append(name)
        for cause, idle in idle_options.items():
            logger.warning_once(f"DepthAttnConfig: {', '.join(idle)} have no effect with {cause}.")

    def _why_without_norm(self) -> str | None:
        """Return the options with which the connection has no norms, although others have them."""
        if self.connection == DepthConnectionType.HYPER_CONNECTIONS and self.stream_mix == StreamMix.STATIC:
            return f"stream_mix={str(self.stream_mix)!r}"
        # An input-dependent query normalises the newest source.
        if self.connection == DepthConnectionType.ATTN_RES and not self.key_norm and self.query == QueryType.STATIC:
            return f"key_norm=False and query={str(self.query)!r}"
        return None

    def validate_blocks(self):
        """Check the number of blocks, of sublayers per block, of heads and of sources in the window."""
        if getattr(self.text_config, "num_hidden_layers", 0) < 1:
            return  # `validate_host` raises for it
        num_sublayers = self.num_sublayers
        if self.num_blocks is not None and self.sublayers_per_block is not None:
            raise ValueError(
                f"num_blocks: {self.num_blocks} and sublayers_per_block: {self.sublayers_per_block} were both given; "
                "give only one of them."
            )
        for field in _BLOCK_FIELDS:
            value = getattr(self, field)
            if value is not None and not 1 <= value <= num_sublayers:
                raise ValueError(
                    f"{field}: {value} must be between 1 and {num_sublayers}, the number of sublayers "
                    f"(2 * num_hidden_layers) of the host."
                )
        if self.depth_window is not None:
            if self.depth_window < 1:
                raise ValueError(f"depth_window: {self.depth_window} must be at least 1, or None for all sources.")
            if self.read_scale == ReadScale.SUM:
                raise ValueError(
                    f"depth_window: {self.depth_window} needs read_scale='mean': with 'sum', reads must include every "
                    "source to reproduce the residual stream."
                )
        hidden_size = self.text_config.hidden_size
        if self.num_depth_heads < 1 or hidden_size % self.num_depth_heads:
            raise ValueError(
                f"num_depth_heads: {self.num_depth_heads} must be a positive divisor of hidden_size {hidden_size}."
            )


# `python -OO` removes docstrings.
if DepthAttnConfig.__doc__ is not None:
    DepthAttnConfig.__doc__ = DepthAttnConfig.__doc__.format(options=describe_options().lstrip())

__all__ = ["DepthAttnConfig"]
