"""Multi-head and delta attention residuals: folders of `llama_attnres` and `qwen3_attnres`.

github.com/Zimmer061310/multi-head-attention-residuals-test-stuff, github.com/wdlctc/delta-attention-residuals-code.
"""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from .config_fields import ConfigFields
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .tensor_map import ReadNames, Renaming, TensorMap

NAME = "multi-head-attn-res"
PROJECT = "multi-head or delta attention residuals"

_HOSTS = {"llama_attnres": "llama", "qwen3_attnres": "qwen3"}
_LAYERS = "model.layers."
_MODULES = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"self_attn.{name}_norm" for name in "qk"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_RENAMING = Renaming(
    _LAYERS,
    dict(zip(_MODULES, _MODULES, strict=True)),
    {name: name for name in ("model.embed_tokens", "model.norm", "lm_head")},
)
_READS = ReadNames(
    ("attn_res_proj", "attn_res_norm"),
    ("mlp_res_proj", "mlp_res_norm"),
    ("model.final_res_proj", "model.final_res_norm"),
)
# Modes in which sources are the sums of blocks, and values are not changed; `_mh` has several heads.
_FULL, _BLOCK = ("full", "full_mh"), ("block", "block_mh")
# The recency bias of github.com/wdlctc/open-attention-residuals, whose sources are cumulative.
_BIASES = (".attn_res_bias", ".mlp_res_bias")


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint is one of these model types."""
    return foreign.config.get("model_type") in _HOSTS


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: AttnRes on `llama` or `qwen3`.

    Raises:
        UserError: if its mode, gate or sources cannot be expressed.
    """
    folder = foreign.folder
    if biased := next((name for name in foreign.entries if name.endswith(_BIASES)), None):
        raise UserError(
            f"{folder}: tensor {biased!r} is of open-attention-residuals, whose sources are cumulative sums; they "
            "cannot be expressed."
        )
    if "model.final_res_proj.weight" not in foreign.entries:
        raise UserError(f"{folder}: lacks 'model.final_res_proj.weight': it has no read at the output, as ours have.")
    fields = ConfigFields(folder, foreign.config)
    fields.only("attnres_mode", *_FULL, *_BLOCK)
    fields.only("attnres_gate_type", "bias")
    fields.only("attnres_use_null_source", False)
    mode = fields.get("attnres_mode", "block")
    num_blocks, num_heads = fields.integer("attnres_num_blocks", 8), fields.integer("attnres_num_heads", 8)
    # Fields of older versions of the code, which it ignores.
    fields.ignore("attnres_init_bias", "attnres_gate_init")
    host = fields.host(_HOSTS[foreign.config["model_type"]])
    fields.ignore_fields_of_every_config()
    fields.finish()

    num_layers = host.num_hidden_layers
    options: dict[str, Any] = {"sublayers_per_block": 1 if mode in _FULL else 2 * -(-num_layers // num_blocks)}
    if mode.endswith("_mh"):
        options["num_depth_heads"] = num_heads
    tensors = TensorMap(foreign)
    tensors.reads(_READS.of_sites(_LAYERS, num_layers), host.hidden_size)
    if host.tie_word_embeddings:
        tensors.drop("lm_head.weight", "tied to the embeddings")
    tensors.rename(_RENAMING)
    return ImportPlan(host, options, tensors.tensors, tensors.dropped)
