"""Tiny checkpoints in the formats of other projects, written by hand from `ForeignModel`."""

import json
from pathlib import Path

import kimi_oracle
import moda_released
import torch
from foreign_models import ForeignModel
from kimi_oracle import KimiModel
from safetensors.torch import save_file
from torch import Tensor

from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE


def save(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    """Save tensors and config as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
    return folder


def of_layers(model: ForeignModel, prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors of all layers, by their names in a format for the names in `ForeignModel`."""
    return {
        f"{prefix}{layer}.{new}": model.tensor(f"{layer}.{name}")
        for layer in range(model.num_layers)
        for name, new in names.items()
    }


def of_reads(model: ForeignModel, prefix: str, attention: str, mlp: str, output: str) -> dict[str, Tensor]:
    """Return queries `[1, D]` and key norms of all sites; the arguments are the names up to `proj` or `norm`."""
    found = {}
    for site in range(2 * model.num_layers + 1):
        name = f"{prefix}{site // 2}.{mlp if site % 2 else attention}"
        name = output if site == 2 * model.num_layers else name
        found[f"{name}proj.weight"] = model.tensor(f"query.{site}")[None]
        found[f"{name}norm.weight"] = model.tensor(f"key_norm.{site}")
    return found


_HF_NAMES = {
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}


def fla(folder: Path, model: ForeignModel, **fields) -> Path:
    """flash-linear-attention, model `transformer`."""
    names = {
        **{name: f"attn.{name}_proj.weight" for name in "qkvo"},
        **({f"{name}_bias": f"attn.{name}_proj.bias" for name in "qkv"} if model.qkv_bias else {}),
        **({f"{name}_norm": f"attn.{name}_norm.weight" for name in "qk"} if model.qk_norm else {}),
        **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        "attn_norm": "attn_norm.weight",
        "mlp_norm": "mlp_norm.weight",
    }
    tensors = of_layers(model, "model.layers.", names)
    tensors |= of_reads(model, "model.layers.", "attn_res_", "mlp_res_", "model.res_")
    tensors["model.embeddings.weight"] = model.tensor("embed")
    tensors["model.norm.weight"] = model.tensor("final_norm")
    if not model.tied:
        tensors["lm_head.weight"] = model.tensor("head")
    config = {
        "model_type": "transformer",
        "architectures": ["TransformerForCausalLM"],
        "attnres_block_size": model.sublayers_per_block,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "swish",
        "norm_eps": model.eps_of("block"),
        "qk_norm": model.qk_norm,
        "qkv_bias": model.qkv_bias,
        "window_size": model.window,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocab_size,
        "fuse_norm": True,
        "fuse_swiglu": True,
        "use_l2warp": False,
        "elementwise_affine": True,
        "transformers_version": "4.57.1",
        "torch_dtype": "float32",
    }
    return save(folder, config | fields, tensors)


def multi_head(folder: Path, model: ForeignModel, mode: str, num_blocks: int = 2, **fields) -> Path:
    """Multi-head attention residuals, `llama_attnres` or `qwen3_attnres`."""
    names = _HF_NAMES | ({f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"} if model.qk_norm else {})
    tensors = of_layers(model, "model.layers.", names)
    tensors |= of_reads(model, "model.layers.", "attn_res_", "mlp_res_", "model.final_res_")
    tensors["model.embed_tokens.weight"] = model.tensor("embed")
    tensors["model.norm.weight"] = model.tensor("final_norm")
    tensors["lm_head.weight"] = model.tensor("embed" if model.tied else "head")
    config = {
        "model_type": "qwen3_attnres" if model.qk_norm else "llama_attnres",
        "attnres_mode": mode,
        "attnres_num_blocks": num_blocks,
        "attnres_num_heads": model.num_depth_heads,
        "attnres_gate_type": "bias",
        "attnres_use_null_source": False,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "rms_norm_eps": model.eps_of("block"),
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocab_size,
        "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    return save(folder, config | fields, tensors)


def olmo_core(folder: Path, model: ForeignModel) -> Path:
    """OLMo-core with AttnRes or MoDA, after `unshard_checkpoint`."""
    attention, feed_forward = ("attention.attention", "feed_forward.feed_forward")
    if not model.moda:
        attention, feed_forward = ("attention", "feed_forward")
    names = {
        **{name: f"{attention}.w_{'out' if name == 'o' else name}.weight" for name in "qkvo"},
        **({f"{name}_norm": f"{attention}.{name}_norm.weight" for name in "qk"} if model.qk_norm else {}),
        **dict(zip(("gate", "down", "up"), (f"{feed_forward}.w{i}.weight" for i in (1, 2, 3)), strict=True)),
        "attn_norm": "attention_norm.weight",
        "mlp_norm": "feed_forward_norm.weight",
    }
    tensors = of_layers(model, "blocks.", names)
    if model.moda:
        for layer in range(model.num_layers - 1):
            halves = [model.tensor(f"{layer}.depth_{name}") for name in "kv"]
            tensors[f"blocks.{layer}.feed_forward.kv_proj.weight"] = torch.cat(halves)
    else:
        tensors |= of_reads(model, "blocks.", "attn_res_", "mlp_res_", "res_")
        # The first read has a single source.
        for name in ("proj", "norm"):
            del tensors[f"blocks.0.attn_res_{name}.weight"]
    tensors["embeddings.weight"] = model.tensor("embed")
    tensors["lm_head.norm.weight"] = model.tensor("final_norm")
    tensors["lm_head.w_out.weight"] = model.tensor("head")

    config = {
        "model": _olmo_core_model(model),
        "dataset": {"sequence_length": 64, "tokenizer": {"identifier": "someone/tokenizer", "eos_token_id": 2}},
    }
    return save(folder, config, tensors)


def _olmo_core_model(model: ForeignModel) -> dict:
    """Return the config of a model with all fields that `as_config_dict` of OLMo-core fa6c5014c (June 2026) writes.

    They are those of its `TransformerConfig.llama_like`, without those that are null, and of the blocks of DepthBench.
    """

    def part(name: str, /, **fields) -> dict:
        return {**fields, "_CLASS_": f"olmo_core.nn.{name}"}

    def norm(eps: float) -> dict:
        return part("layer_norm.LayerNormConfig", name="rms", eps=eps, bias=False, dtype="float32")

    rope = {"theta": model.rope_theta, "full_precision": True, "no_global_rope": False, "partial_rotary_factor": 1.0}
    qk_norm = {"qk_norm": norm(model.eps_of("qk"))} if model.qk_norm else {}
    mixer = part(
        "attention.AttentionConfig",
        name="default",
        n_heads=model.num_heads,
        n_kv_heads=model.num_kv_heads,
        bias=False,
        rope=part("rope.RoPEConfig", name="default", **rope),
        **qk_norm,
        dtype="float32",
        use_head_qk_norm=model.qk_norm,
        type="attention",
    )
    own: dict = {"name": "attnres", "attnres_block_size": model.sublayers_per_block}
    if model.moda:
        moda = {"cache_post_norm_k": True, "extra_ffn_kv_proj": True, "extra_attn_kv_proj": False}
        moda |= {"backend": "v17", "depth_bs": 64, "depth_warps": 4}
        own = {"name": "moda" if model.moda == "pre" else "post_norm_moda"}
        own |= {"moda": part("transformer.config.MoDAConfig", **moda), "moda_skip_ffn_kv": False}
    mlp = {"hidden_size": model.intermediate_size, "name": "default", "bias": False, "activation": "silu"}
    blocks = part(
        "transformer.config.TransformerBlockConfig",
        sequence_mixer=mixer,
        layer_norm=norm(model.eps_of("first")),
        feed_forward=part("feed_forward.FeedForwardConfig", **mlp, dtype="float32"),
        **own,
    )
    last = str(model.num_layers - 1)
    overrides = {"block_overrides": {last: blocks | {"moda_skip_ffn_kv": True}}} if model.moda else {}
    head = {"name": "default", "layer_norm": norm(model.eps_of("final")), "bias": False}
    return part(
        "transformer.config.TransformerConfig",
        d_model=model.hidden_size,
        vocab_size=model.vocab_size,
        n_layers=model.num_layers,
        block=blocks,
        lm_head=part("lm_head.LMHeadConfig", **head, dtype="float32", loss_implementation="default"),
        name="default",
        dtype="float32",
        init_method="normal",
        init_seed=0,
        init_std=0.02,
        tie_word_embeddings=False,
        **overrides,
    )


_BLAGPT_PARTS = (
    "canon_layers",
    "engram",
    "kda_interleaving",
    "parallel_blocks",
    "per_layer_token_emb",
    "per_token_output_bias",
    "pre_post_norm",
    "qkv_bias",
    "res_weights",
    "soft_logit_capping",
    "softpick",
    "stem",
    "top",
)


def blagpt(folder: Path, *, bias: bool, compiled: bool = False, **fields) -> Path:
    """The language model of MoDA's authors with the weights of `moda_released`, in float64."""
    width, hidden = moda_released.HIDDEN_SIZE, 2 * moda_released.HIDDEN_SIZE
    kv = 2 * moda_released.NUM_KV_HEADS * moda_released.HEAD_DIM
    projections = {
        "attn.q_proj": (width, width),
        "attn.kv_proj": (kv, width),
        "attn.c_proj": (width, width),
        "mlp.c_gate": (hidden, width),
        "mlp.c_fc": (hidden, width),
        "mlp.c_proj": (width, hidden),
        "mlp.kv_proj": (kv, width),
    }
    norms = {
        "attn.q_norm": (moda_released.HEAD_DIM,),
        "attn.k_norm": (moda_released.HEAD_DIM,),
        "ln_1": (width,),
        "ln_2": (width,),
    }
    tensors = {"transformer.wte.weight": (moda_released.VOCAB_SIZE, width), "transformer.ln_f.weight": (width,)}
    for layer in range(moda_released.NUM_LAYERS):
        for name, shape in (projections | norms).items():
            tensors[f"transformer.h.{layer}.{name}.weight"] = shape
        if bias:
            tensors |= {f"transformer.h.{layer}.{name}.bias": shape[:1] for name, shape in projections.items()}
    # Its final norm is wrapped.
    values = {
        name.replace("ln_f", "ln_f.norm"): moda_released.released_weight(name, *shape)
        for name, shape in tensors.items()
    }
    values["lm_head.weight"] = values["transformer.wte.weight"]
    prefix = "_orig_mod." if compiled else ""
    # `dataclasses.asdict` of `DepthScalingMoDA512T64LPostNorm1p3BConfig` (hustvl/MoDA 992a275), in this size.
    config = {
        "n_embd": width,
        "n_head": moda_released.NUM_HEADS,
        "n_kv_head": moda_released.NUM_KV_HEADS,
        "n_layer": moda_released.NUM_LAYERS,
        "vocab_size": moda_released.VOCAB_SIZE,
        "block_size": 64,
        "bias": bias,
        "activation": "swiglu",
        "attention": "regular",
        "attention_regularization": None,
        "device_batch_size": 8,
        "dilation_rates": [1, 2, 4, 6, 12],
        "dropout": 0.0,
        "enable_weight_sharing": False,
        "engram_ngram": 3,
        "engram_share_embedding": True,
        "engram_variant": "ngram_lambda",
        "engram_vocab_mult": 5,
        "kda_chunk_size": 64,
        "kda_decay_rank": None,
        "kda_interleave_ratio": 4,
        "kda_interleave_with": "regular",
        "kda_use_short_conv": True,
        "mlp_multiplier": 2.0,
        "moda_backend": "v17",
        "n_latentd": 0,
        "n_predict": 1,
        "norm_layer": "rmsnorm",
        "num_iterations": 5100,
        "optimizer_args": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
        "optimizer_name": "Muon",
        "per_layer_token_emb_dim": 256,
        "polycom_order": 3,
        "pos_encoding": "rotary",
        "rmsnorm_before_qk": True,
        "rope_theta": 10000,
        "rope_variant": "standard",
        "segment_sizes": [64, 128, 256, 512, 1024],
        "sequence_length": 512,
        "share_prediction_heads": False,
        "stem_layers": [],
        "stem_ratio": None,
        "tie_embed_weights": True,
        "top_force_optimized": True,
        "top_loss_weight": 1.0,
        "top_window_size": 1024,
        "weight_sharing_groups": 1,
        "weight_sharing_pattern": [],
        "z_loss_weight": 0.0,
        "zero_init_proj_layers": False,
        **{f"use_{name}": False for name in _BLAGPT_PARTS},
    }
    return save(folder, config | fields, {f"{prefix}{name}": value for name, value in values.items()})


def kimi(folder: Path, model: KimiModel) -> Path:
    """AttnRes under the names of Kimi K3 on `kimi_linear`, with queries in bfloat16."""
    reads = of_reads(model, "model.layers.", "self_attention_res_", "mlp_res_", "model.output_attn_res_")
    tensors = model.tensors | {name: value.bfloat16() for name, value in reads.items()}
    return save(folder, kimi_oracle.config(model), tensors)
