"""MoDA of OLMo-core: blocks with the names `moda` and `post_norm_moda`."""

from __future__ import annotations

from typing import Any

from . import olmo_core
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .olmo_core import LAYERS, ON_TOP, block_name, eps_overrides, read_model, tokenizer_name
from .tensor_map import Renaming, TensorMap

NAME = "olmo-core-moda"
PROJECT = olmo_core.PROJECT

_RENAMING = Renaming(
    LAYERS,
    {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.attention.w_q": "self_attn.q_proj",
        "attention.attention.w_k": "self_attn.k_proj",
        "attention.attention.w_v": "self_attn.v_proj",
        "attention.attention.w_out": "self_attn.o_proj",
        "attention.attention.q_norm": "self_attn.q_norm",
        "attention.attention.k_norm": "self_attn.k_norm",
        "feed_forward.feed_forward.w1": "mlp.gate_proj",
        "feed_forward.feed_forward.w2": "mlp.down_proj",
        "feed_forward.feed_forward.w3": "mlp.up_proj",
    },
    ON_TOP,
)
_NORM_POSITIONS = {"moda": "host", "post_norm_moda": "post"}


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint has such blocks."""
    return block_name(foreign) in _NORM_POSITIONS


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: MoDA on `llama` or `qwen3`.

    Raises:
        UserError: if it has something that those hosts or MoDA cannot express.
    """
    # The last block has no projections, since no layer reads their slot.
    model = read_model(foreign, last_block={"moda_skip_ffn_kv": True})
    block = model.block
    block.ignore("moda_skip_ffn_kv")
    moda = block.part("moda")
    moda.ignore("backend", "depth_bs", "depth_warps")
    # The first layer ignores the scale; slots without values of their own would be zeros in the softmax.
    moda.only("attention_scale")
    moda.only("extra_ffn_kv_proj", True)
    moda.only("extra_attn_kv_proj", False)
    stores_normed_keys = moda.flag("cache_post_norm_k", True)
    if not stores_normed_keys and model.qk_eps is not None:
        raise moda.error("cache_post_norm_k", False, "true, or without norms of keys")
    moda.finish()
    block.finish()

    num_layers = model.num_layers
    rows = model.sizes["num_key_value_heads"] * model.sizes["head_dim"]
    tensors = TensorMap(foreign)
    for layer in range(num_layers - 1):
        new = f"model.layers.{layer}.mlp_depth_kv"
        halves = [(f"{new}.k_proj.weight", rows, None), (f"{new}.v_proj.weight", rows, None)]
        tensors.split_rows(f"{LAYERS}{layer}.feed_forward.kv_proj.weight", halves)
    tensors.drop(f"{LAYERS}{num_layers - 1}.feed_forward.kv_proj.weight", "no layer reads its slot")
    tensors.rename(_RENAMING)
    norms = {"norm": model.final_eps, "q_norm": model.qk_eps, "k_norm": model.qk_eps}
    options: dict[str, Any] = {
        "connection": "residual",
        "depth_kv": "attention+mlp",
        "depth_key_rope": "none",
        "norm_position": _NORM_POSITIONS[block_name(foreign) or ""],
        **eps_overrides(norms, model.block_eps),
    }
    host = model.host(foreign.folder, model.block_eps)
    return ImportPlan(host, options, tensors.tensors, tensors.dropped, tokenizer=tokenizer_name(foreign))
