"""Tiny random hosts: one config per supported model type, small enough to build dozens of them in a test run."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_depthattn.host_layouts import supported_hosts

VOCAB_SIZE = 97
NUM_LAYERS = 3

# Sizes that all or many hosts have; keys that a config does not declare are dropped.
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

_MULTI_HEAD_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# DeepSeek's sparse attention with fewer keys than tokens in the tests. With few heads many keys would have the score 0
# (a sum of ReLUs), and sorting would choose among them arbitrarily.
_INDEXED = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 16}

_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
}

_OVERRIDES = {
    "axk1": {**_MULTI_HEAD_LATENT},
    "axk2": {**_MULTI_HEAD_LATENT, **_INDEXED},
    "bailing_hybrid": {
        **_MULTI_HEAD_LATENT,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "deepseek_v2": {**_MULTI_HEAD_LATENT, "n_shared_experts": 1, "topk_method": "greedy"},
    "deepseek_v3": _MULTI_HEAD_LATENT,
    "deepseek_v32": {**_MULTI_HEAD_LATENT, **_INDEXED},
    "dots3_note_text": {
        **_MULTI_HEAD_LATENT,
        **_INDEXED,
        "n_group": 1,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 16,
        **{
            f"swa_{name}": value
            for name, value in _MULTI_HEAD_LATENT.items()
            if "group" not in name and "dense" not in name
        },
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
    },
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
    "dots1": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "solar_open": {"n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0, "head_dim": 8},
    "glm4_moe_lite": {**_MULTI_HEAD_LATENT, "n_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "youtu": _MULTI_HEAD_LATENT,
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "granitemoe": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    "granitemoe_swa": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "shared_intermediate_size": 16},
    "granitemoeshared": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "shared_intermediate_size": 16},
    "granitemoehybrid": {
        "residual_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "shared_intermediate_size": 16,
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hyperclovax": {"residual_multiplier": 0.3, "use_post_norm": True},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3, "expert_layer_offset": 1, "expert_layer_period": 2},
    "jetmoe": {"kv_channels": 8},
    "lara_mini": {**_LINEAR_ATTENTION, "layer_types": ["full_attention", "linear_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["sliding_attention", "full_attention", "conv"]},
    "minicpm3": {**_MULTI_HEAD_LATENT},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 16,
    },
    "modernbert-decoder": {
        "local_attention": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "kimi_linear": {
        **_MULTI_HEAD_LATENT,
        "q_lora_rank": None,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "n_group": 1,
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 16},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "persimmon": {"num_key_value_heads": 4},
    "phi3": {"resid_pdrop": 0.0},
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
            "input_size": 16,
        },
    },
    "qwen3_5_moe_text": _LINEAR_ATTENTION,
    "qwen3_5_text": _LINEAR_ATTENTION,
    "qwen3_next": _LINEAR_ATTENTION,
    "sarvam_mla": _MULTI_HEAD_LATENT,
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
}

#: Hosts with a special form of rotary parameters, which keep their default.
_OWN_ROPE = frozenset(
    {
        "gemma3_text",
        "laguna",
        "lfm3",
        "mellum",
        "mimo_v2_flash",
        "ministral3",
        "modernbert-decoder",
        "olmo3",
        "solar_open",
    }
)


def tiny_host_config(model_type: str, **overrides) -> PreTrainedConfig:
    """Build a tiny config of a model type; `overrides` take precedence. Skips a test if transformers is too old."""
    if model_type in set(supported_hosts()) - set(ALL_HOSTS):
        pytest.skip(f"transformers {transformers.__version__} does not have {model_type}")
    config_class = CONFIG_MAPPING[model_type]
    declared = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    skipped = {"rope_parameters"} if model_type in _OWN_ROPE else set()
    values = {key: value for key, value in _COMMON.items() if key in declared - skipped}
    # Copy, since some configs modify the dicts that they are given.
    return config_class(**copy.deepcopy({**values, **_OVERRIDES.get(model_type, {}), **overrides}))


def tiny_stock_model(model_type: str, dtype: torch.dtype = torch.float32, **overrides) -> torch.nn.Module:
    """Build a stock causal LM in eval mode whose parameters all differ randomly from their initial values."""
    # The grouped matrix product of MoE hosts does not support float64.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(tiny_host_config(model_type, **overrides), dtype=torch.float32, **experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_ids(batch_size: int, length: int) -> torch.Tensor:
    """Draw token ids, excluding special tokens."""
    return torch.randint(3, VOCAB_SIZE, (batch_size, length))


#: Hosts that the installed transformers supports.
ALL_HOSTS = tuple(name for name in supported_hosts() if name in CONFIG_MAPPING)

#: Mark of tests that need Kimi Linear itself.
needs_kimi_linear = pytest.mark.skipif(
    "kimi_linear" not in ALL_HOSTS, reason=f"transformers {transformers.__version__} does not have kimi_linear"
)
