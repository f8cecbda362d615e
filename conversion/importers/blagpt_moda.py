"""The language model of MoDA's authors: `MoDADepthScalingGPT` in github.com/hustvl/MoDA, language_tasks/BlaGPT.

Its runs leave pickles; docs/importing.md shows how to save one as model.safetensors with a config.json.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config_fields import ConfigFields, build_host
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .tensor_map import Renaming, TensorMap

NAME = "blagpt-moda"
PROJECT = "hustvl/MoDA"

# Before the names of tensors of a model that was compiled.
_COMPILED = "_orig_mod."
# Values with which the model is that of the paper; others switch further parts on.
_ONLY: dict[str, tuple[Any, ...]] = {
    "activation": ("swiglu",),
    "attention": ("regular",),
    "attention_regularization": (),
    "enable_weight_sharing": (False,),
    "n_predict": (1,),
    "norm_layer": ("rmsnorm",),
    "pos_encoding": ("rotary",),
    "rmsnorm_before_qk": (True,),
    "rope_variant": ("standard",),
    "tie_embed_weights": (True,),
    **dict.fromkeys(
        (
            "use_canon_layers",
            "use_engram",
            "use_kda_interleaving",
            "use_parallel_blocks",
            "use_per_layer_token_emb",
            "use_per_token_output_bias",
            "use_pre_post_norm",
            "use_qkv_bias",
            "use_res_weights",
            "use_soft_logit_capping",
            "use_softpick",
            "use_stem",
            "use_top",
        ),
        (False,),
    ),
}
# Fields of training, sizes of parts that `_ONLY` leaves out, and the width of the MLP, which its tensors show.
_IGNORED = (
    "device_batch_size",
    "dilation_rates",
    "dropout",
    "engram_ngram",
    "engram_share_embedding",
    "engram_variant",
    "engram_vocab_mult",
    "kda_chunk_size",
    "kda_decay_rank",
    "kda_interleave_ratio",
    "kda_interleave_with",
    "kda_use_short_conv",
    "mlp_multiplier",
    "moda_backend",
    "n_latentd",
    "num_iterations",
    "optimizer_args",
    "optimizer_name",
    "per_layer_token_emb_dim",
    "polycom_order",
    "segment_sizes",
    "sequence_length",
    "share_prediction_heads",
    "stem_layers",
    "stem_ratio",
    "top_force_optimized",
    "top_loss_weight",
    "top_window_size",
    "weight_sharing_groups",
    "weight_sharing_pattern",
    "z_loss_weight",
    "zero_init_proj_layers",
)
# The end-of-text token of GPT-2's tokenizer.
_GPT2_END = 50256
# Epsilon of its own RMSNorm.
_EPS = 1e-8
_NOTE = (
    "norms of queries and keys have the epsilon 1e-8; if apex was installed when the model was trained, set "
    'norm_eps_overrides to {"q_norm": 1e-5, "k_norm": 1e-5} in config.json'
)


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint has the projections of this model."""
    return any(name.endswith("transformer.h.0.mlp.kv_proj.weight") for name in foreign.entries)


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: MoDA on `qwen3`, or on `hy_v3` if it has biases.

    Raises:
        UserError: if a part is switched on that those hosts do not have, or a field is not known here.
    """
    folder = foreign.folder
    fields = ConfigFields(folder, foreign.config)
    for name, allowed in _ONLY.items():
        fields.only(name, *allowed)
    hidden_size, num_heads = fields.integer("n_embd"), fields.integer("n_head")
    num_kv_heads, num_layers = fields.integer("n_kv_head"), fields.integer("n_layer")
    bias, vocab_size = fields.flag("bias", True), fields.integer("vocab_size", 50304)
    max_positions, rope_theta = fields.integer("block_size", 512), fields.number("rope_theta", 10000.0)
    fields.ignore(*_IGNORED)
    fields.finish()
    head_dim = hidden_size // num_heads

    compiled = _COMPILED if any(name.startswith(_COMPILED) for name in foreign.entries) else ""
    root = f"{compiled}transformer."
    tensors = TensorMap(foreign)
    tensors.check_present(f"{root}h.0.mlp.c_fc.weight")
    sizes = {
        "hidden_size": hidden_size,
        "vocab_size": vocab_size,
        "intermediate_size": foreign.entries[f"{root}h.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": _EPS,
        "attention_bias": bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), _GPT2_END if vocab_size > _GPT2_END else None),
        "pad_token_id": None,
    }
    _map_tensors(tensors, root, compiled, num_layers, num_heads, num_kv_heads, head_dim, bias)
    if bias:
        # The one host that has biases everywhere; all its layers are dense here.
        host = build_host(folder, "hy_v3", sizes | {"mlp_bias": True, "mlp_layer_types": ["dense"] * num_layers})
    else:
        host = build_host(folder, "qwen3", sizes)
    options = {
        "connection": "residual",
        "depth_kv": "attention+mlp",
        "depth_key_rope": "none",
        "depth_key_norm": "reader",
        "depth_kv_bias": bias,
        "norm_position": "post",
    }
    return ImportPlan(host, options, tensors.tensors, tensors.dropped, (_NOTE,))


def _map_tensors(
    tensors: TensorMap,
    root: str,
    compiled: str,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    bias: bool,
) -> None:
    """Map all tensors.

    The rotation turns the other way than that of transformers. With the second half of the channels of every query and
    key negated it turns the same way, and scores stay the same; norms commute with it.
    """
    leaves = ("weight", "bias") if bias else ("weight",)
    query_signs, key_signs = _rotation_signs(num_heads, head_dim), _rotation_signs(num_kv_heads, head_dim)
    rows = num_kv_heads * head_dim
    for layer in range(num_layers):
        old, new = f"{root}h.{layer}", f"model.layers.{layer}"
        for leaf in leaves:
            tensors.copy(f"{old}.attn.q_proj.{leaf}", f"{new}.self_attn.q_proj.{leaf}", query_signs)
            modules = {f"{old}.attn.kv_proj.{leaf}": "self_attn", f"{old}.mlp.kv_proj.{leaf}": "mlp_depth_kv"}
            if layer == num_layers - 1:
                unread, _ = modules.popitem()
                tensors.drop(unread, "no layer reads its slot")
            for name, module in modules.items():
                key, value = (f"{new}.{module}.{projection}_proj.{leaf}" for projection in "kv")
                tensors.split_rows(name, [(key, rows, key_signs), (value, rows, None)])
    tensors.drop(f"{compiled}lm_head.weight", "tied to the embeddings")
    in_layer = {
        "attn.c_proj": "self_attn.o_proj",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "mlp.c_gate": "mlp.gate_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    on_top = {f"{root}wte": "model.embed_tokens", f"{root}ln_f.norm": "model.norm"}
    tensors.rename(Renaming(f"{root}h.", in_layer, on_top))


def _rotation_signs(num_heads: int, head_dim: int) -> Tensor:
    """Return 1 for the first half of the channels of every head and -1 for the second, `[num_heads * head_dim]`."""
    half = torch.ones(head_dim // 2, dtype=torch.float64)
    return torch.cat([half, -half]).repeat(num_heads)
