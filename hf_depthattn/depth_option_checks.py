"""Checks of the fields of `DepthAttnConfig`."""

import math
from typing import TYPE_CHECKING

from transformers.utils import logging

from .deepnorm_projections import why_not_scaled
from .depth_options import (
    DEPTH_OPTIONS,
    DepthConnectionType,
    DepthKeyNormType,
    DepthKVType,
    DepthOptions,
    NormPosition,
    QueryType,
    ReadScale,
    StreamMix,
    option_default,
    require_member,
)
from .host_attention import REFUSED_DEPTH_KV, REFUSED_VALUE_RESIDUAL, host_attention
from .host_layouts import HostLayout, host_layout, post_norm_layout, require_sequential
from .host_norm import host_norm_eps
from .moda_slot_plan import check_depth_slots, linear_attention_layers

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

logger = logging.get_logger(__name__)

# Connections that need norms before sublayers, and those that work with norms after the sums.
_NEED_PRE_NORM = frozenset({DepthConnectionType.LAYER_NORM_SCALING, DepthConnectionType.KEEL})
_ALLOW_POST_NORM = frozenset({DepthConnectionType.RESIDUAL, DepthConnectionType.DEEPNORM})
#: Largest number of streams of mHC-lite, which has n! weights for n streams: 24 for 4, 120 for 5.
MAX_PERMUTED_STREAMS = 4
_BLOCK_FIELDS = ("num_blocks", "sublayers_per_block")

# Options of AttnRes without an effect beside `static_mix`, which has no keys.
_KEY_OPTIONS = ("key_norm", "depth_norm_eps")


class DepthOptionChecks(DepthOptions):
    """The checks of `DepthAttnConfig`.

    transformers calls every `validate_*` at the end of `__init__`, in `save_pretrained` and in `from_dict`.
    """

    if TYPE_CHECKING:
        text_config: dict | PreTrainedConfig | None

        @property
        def host_config(self) -> PreTrainedConfig: ...

        @property
        def host_layout(self) -> HostLayout: ...

        @property
        def num_sublayers(self) -> int: ...

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

    def validate_norm_eps_overrides(self):
        """Check the epsilons of norms; whether the host has these norms is checked when a model is built."""
        for name, eps in (self.norm_eps_overrides or {}).items():
            if not 0 < eps < math.inf:
                raise ValueError(f"norm_eps_overrides: {eps} for {name!r} must be greater than 0 and finite.")

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
            verb = "has" if len(idle) == 1 else "have"
            logger.warning_once(f"DepthAttnConfig: {', '.join(idle)} {verb} no effect with {cause}.")

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
