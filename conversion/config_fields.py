"""Names of config fields that commands take, apart from the config class, which needs torch."""

from __future__ import annotations

#: Fields of `DepthAttnConfig` that can be given to `retrofit`.
CONFIG_FIELDS = (
    "connection",
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
    "depth_kv",
    "depth_key_rope",
    "depth_key_norm",
    "depth_gate",
    "num_depth_slots",
    "norm_position",
)

#: Those of MoDA that mean nothing without `depth_kv`.
DEPTH_KV_OPTIONS = ("depth_gate", "depth_key_rope", "depth_key_norm", "num_depth_slots")
