"""Folders of the model `transformer` of github.com/fla-org/flash-linear-attention with AttnRes."""

from __future__ import annotations

import math
from typing import Any

from ...errors import UserError
from .config_fields import ConfigFields, build_host
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .tensor_map import ReadNames, Renaming, TensorMap

NAME = "fla"
PROJECT = "flash-linear-attention"

MODEL_TYPE = "transformer"
LAYERS = "model.layers."
RENAMING = Renaming(
    LAYERS,
    {
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{f"attn.{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
        **{f"attn.{name}_norm": f"self_attn.{name}_norm" for name in "qk"},
        **{f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    },
    {"model.embeddings": "model.embed_tokens", "model.norm": "model.norm", "lm_head": "lm_head"},
)
READS = ReadNames(
    ("attn_res_proj", "attn_res_norm"), ("mlp_res_proj", "mlp_res_norm"), ("model.res_proj", "model.res_norm")
)
#: Epsilon of the norms of queries and keys, whatever the config says.
QK_NORM_EPS = 1e-5


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint is one of flash-linear-attention."""
    return "attnres_block_size" in foreign.config and "num_heads" in foreign.config


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: AttnRes on `llama`, `qwen2`, `qwen3` or `mistral`.

    Raises:
        UserError: if it is another of the library's models, or has something that those hosts cannot express.
    """
    folder = foreign.folder
    fields = ConfigFields(folder, foreign.config)
    model_type = fields.get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError(
            f"{folder}: model_type {model_type!r} of {PROJECT} has layers that no supported host has; only "
            f"{MODEL_TYPE!r} can be imported."
        )
    if fields.get("attnres_block_size") is None:
        raise UserError(f"{folder}: attnres_block_size is null in config.json: it has no AttnRes, nothing to import.")
    block_size = fields.integer("attnres_block_size")
    sizes = _sizes(fields)
    fields.only("hidden_act", "swish", "silu")
    qkv_bias, qk_norm = fields.flag("qkv_bias"), fields.flag("qk_norm")
    window = None if fields.get("window_size") is None else fields.integer("window_size")
    host_type, own = _host(qkv_bias, qk_norm, window)
    fields.ignore_fields_of_every_config()
    fields.ignore("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
    fields.ignore("hidden_ratio", "elementwise_affine")
    fields.finish()

    num_layers, hidden_size = sizes["num_hidden_layers"], sizes["hidden_size"]
    options: dict[str, Any] = {"sublayers_per_block": min(block_size, 2 * num_layers)}
    if qk_norm and sizes["rms_norm_eps"] != QK_NORM_EPS:
        options["norm_eps_overrides"] = {"q_norm": QK_NORM_EPS, "k_norm": QK_NORM_EPS}
    tensors = TensorMap(foreign)
    tensors.reads(READS.of_sites(LAYERS, num_layers), hidden_size)
    if sizes["tie_word_embeddings"]:
        tensors.drop("lm_head.weight", "tied to the embeddings")
    if qk_norm and qkv_bias:
        # Qwen3 has a bias on all projections of attention or on none.
        for layer in range(num_layers):
            weight = foreign.entries.get(f"{LAYERS}{layer}.attn.o_proj.weight")
            if weight is not None:
                tensors.constant(f"{LAYERS}{layer}.self_attn.o_proj.bias", weight.dtype, (hidden_size,), 0.0)
    tensors.rename(RENAMING)
    return ImportPlan(build_host(folder, host_type, sizes | own), options, tensors.tensors, tensors.dropped)


def _sizes(fields: ConfigFields) -> dict[str, Any]:
    """Return the fields that all hosts have."""
    if fields.value("rope_theta", 10000.0) is None:
        raise fields.error("rope_theta", None, "a positive number")
    hidden_size = fields.integer("hidden_size", 2048)
    num_heads = fields.integer("num_heads", 32)
    # The default of the library: a multiple of 256 near 8/3 of the hidden size.
    ratio = fields.number("hidden_ratio", 4)
    default_width = 256 * math.ceil(int(hidden_size * ratio * 2 / 3) / 256)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": fields.integer("num_hidden_layers", 24),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("num_kv_heads", num_heads),
        "head_dim": hidden_size // num_heads,
        "intermediate_size": fields.integer("intermediate_size", default_width),
        "vocab_size": fields.integer("vocab_size", 32000),
        "max_position_embeddings": fields.integer("max_position_embeddings", 2048),
        "rms_norm_eps": fields.number("norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields.number("rope_theta", 10000.0)},
        "initializer_range": fields.number("initializer_range", 0.02),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "pad_token_id": fields.get("pad_token_id"),
        "bos_token_id": fields.value("bos_token_id", 1),
        "eos_token_id": fields.value("eos_token_id", 2),
    }


def _host(qkv_bias: bool, qk_norm: bool, window: int | None) -> tuple[str, dict[str, Any]]:
    """Return the model type of the host, and the fields that only this host has."""
    windowed = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    if qk_norm:
        return "qwen3", {"attention_bias": qkv_bias, **windowed}
    if qkv_bias:
        return "qwen2", windowed
    if window is not None:
        return "mistral", {"sliding_window": window}
    return "llama", {}
