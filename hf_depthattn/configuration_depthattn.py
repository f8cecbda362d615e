"""Configuration of a decoder with depth attention: the host's own config plus the options of depth attention."""

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

# Some versions of transformers copy only the files that this one imports before they run it. The unused imports are
# those of `depth_option_checks`.
from .deepnorm_projections import why_not_scaled  # noqa: F401
from .depth_option_checks import DepthOptionChecks
from .depth_options import (
    DEPTH_OPTIONS,
    AttnResSchedule,
    NormPosition,
    describe_options,
    option_default,
    replace_options,
    require_member,
)
from .host_attention import host_attention  # noqa: F401
from .host_layouts import HostLayout, host_layout, post_norm_layout
from .host_norm import host_norm_eps
from .moda_slot_plan import DepthSlotPlan, plan_depth_slots
from .remote_code import saved_with_code, without_code

logger = logging.get_logger(__name__)

#: Number of blocks (N) recommended by the paper, which the default size of blocks approximates.
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

# Flags that the host's forward reads from its own config: setting them on the outer config sets both.
_MIRRORED_ON_HOST = frozenset({"output_attentions", "output_hidden_states"})


@strict
class DepthAttnConfig(DepthOptionChecks, PreTrainedConfig):
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


# `python -OO` removes docstrings.
if DepthAttnConfig.__doc__ is not None:
    DepthAttnConfig.__doc__ = DepthAttnConfig.__doc__.format(options=describe_options().lstrip())

__all__ = ["DepthAttnConfig"]
