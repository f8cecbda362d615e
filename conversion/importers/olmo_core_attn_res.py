"""AttnRes of OLMo-core: blocks with the name `attnres`, in older versions `default`."""

from __future__ import annotations

import math
from typing import Any

from . import olmo_core
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .olmo_core import LAYERS, ON_TOP, block_name, eps_overrides, read_model, tokenizer_name
from .tensor_map import ReadNames, Renaming, TensorMap

NAME = "olmo-core-attn-res"
PROJECT = olmo_core.PROJECT

_RENAMING = Renaming(
    LAYERS,
    {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.w_q": "self_attn.q_proj",
        "attention.w_k": "self_attn.k_proj",
        "attention.w_v": "self_attn.v_proj",
        "attention.w_out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    },
    ON_TOP,
)
_READS = ReadNames(
    ("attn_res_proj", "attn_res_norm"),
    ("mlp_res_proj", "mlp_res_norm"),
    ("res_proj", "res_norm"),
    in_first_layer=False,
)
# Names of the logarithms of factors on the queries of a layer.
_SCALES = ("attnres_logit_scale", "mlp_attnres_logit_scale")
# Whatever `layer_norm.eps` is, the read has this epsilon, and so have the norms that its kernel computes: those of the
# sublayers and the final one.
_READ_EPS = 1e-5


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint has such blocks."""
    name = block_name(foreign)
    if name != "default":
        return name == "attnres"
    # Before there was a name of their own, the ordinary blocks had reads if they were given a block size.
    has_size = foreign.config["model"]["block"].get("attnres_block_size") is not None
    return has_size and f"{LAYERS}0.{_READS.mlp[0]}.weight" in foreign.entries


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: AttnRes on `llama` or `qwen3`.

    Raises:
        UserError: if it has something that those hosts or AttnRes cannot express.
    """
    model = read_model(foreign)
    block = model.block
    block_size = block.integer("attnres_block_size", 1)
    block.only("attnres_use_bias", False)
    block.only("attnres_topk_fraction")
    learns_scale = block.flag("attnres_learn_logit_scale")
    block.finish()

    num_layers = model.num_layers
    tensors = TensorMap(foreign)
    sites = _READS.of_sites(LAYERS, num_layers)
    factors = _logit_scales(tensors, sites, num_layers) if learns_scale else {}
    tensors.reads(sites, model.sizes["hidden_size"], factors)
    # A tensor that has no effect, if it was saved.
    for name in ("attn_res_proj.weight", "attn_res_norm.weight", "attnres_logit_scale"):
        tensors.drop(f"{LAYERS}0.{name}", "the first read has one source")
    tensors.rename(_RENAMING)
    # The first read has a single source, and its norm is computed by the norm's own module.
    norms = {"layers.0.input_layernorm": model.block_eps, "q_norm": model.qk_eps, "k_norm": model.qk_eps}
    options: dict[str, Any] = {"sublayers_per_block": min(block_size, 2 * num_layers)}
    options |= eps_overrides(norms, _READ_EPS)
    host = model.host(foreign.folder, _READ_EPS)
    return ImportPlan(host, options, tensors.tensors, tensors.dropped, tokenizer=tokenizer_name(foreign))


def _logit_scales(tensors: TensorMap, sites: list[tuple[str, str] | None], num_layers: int) -> dict[str, float]:
    """Return the factors `exp(scale)` of the queries by their names."""
    names = [f"{LAYERS}{layer}.{name}" for layer in range(num_layers) for name in _SCALES]
    factors = {}
    for site, name in zip(sites, [*names, "final_attnres_logit_scale"], strict=True):
        if site is not None:
            factors[site[0]] = math.exp(tensors.scalar(name))
    return factors
