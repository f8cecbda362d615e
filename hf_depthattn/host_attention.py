"""Norm and rotation of keys in the attention modules of hosts, as MoDA needs them.

MoDA gets the keys of an attention sublayer as they enter attention: normalised and rotated. To bring keys of MLP
sublayers into the same form, or to undo the rotation, it applies the host's own norm and rotation. There is one table
row per family of hosts; a host without a row is like Llama.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass(frozen=True)
class HostAttention:
    """Norm and rotation of keys in a family of hosts.

    Attributes:
        rotary: name of the rotation function in the host's modeling file; `None` for hosts without rotary embeddings.
        is_rotated: function of an attention module that returns whether it rotates keys; some hosts do so only in
            sliding-window layers.
        mixed_rotation: whether the layers of a model may rotate differently.
        key_norm: name of the module that normalises keys, if an attention module has one.
        norms_after_rotation: whether keys are normalised after the rotation instead of before.
        is_latent: multi-head latent attention: keys and values are expanded from a latent to all heads, and only the
            last `qk_rope_head_dim` channels of a key are rotated.
        lacks_positions_unrotated: whether the host passes position embeddings only to layers that rotate keys.
        num_leading_rotated: attribute of an attention module with the number of leading channels that it rotates;
            `None` if the rotation function itself selects the channels.
        fuses_projections: whether one projection computes queries, keys and values; `k_proj` does not exist then.
        always_norms: whether all attention modules of the host normalise keys, so that slots of layers without
            attention need the norm too.
    """

    rotary: str | None = "apply_rotary_pos_emb"
    is_rotated: Callable[[nn.Module], bool] = lambda attention: True
    mixed_rotation: bool = False
    key_norm: str = "k_norm"
    norms_after_rotation: bool = False
    is_latent: bool = False
    lacks_positions_unrotated: bool = False
    num_leading_rotated: str | None = None
    fuses_projections: bool = False
    always_norms: bool = False


def _where_sliding(attention: nn.Module) -> bool:
    return bool(attention.sliding_window is None or attention.is_sliding)


_LLAMA = HostAttention()
_LATENT = HostAttention(is_latent=True)
_ROTATED_WHERE_SLIDING = HostAttention(is_rotated=_where_sliding, mixed_rotation=True)

_BY_MODEL_TYPE: dict[str, HostAttention] = {
    "afmoe": HostAttention(is_rotated=lambda attention: bool(attention.is_local_attention), mixed_rotation=True),
    "axk1": _LATENT,
    "bailing_hybrid": _LATENT,
    "deepseek_v2": HostAttention(rotary="apply_rotary_emb", is_latent=True),
    "deepseek_v3": _LATENT,
    "exaone4": _ROTATED_WHERE_SLIDING,
    "exaone_moe": _ROTATED_WHERE_SLIDING,
    "flint": HostAttention(is_rotated=lambda attention: attention.sliding_window is not None, mixed_rotation=True),
    "glm4_moe_lite": _LATENT,
    # Layers that rotate may have different bases.
    "granite_swa": HostAttention(mixed_rotation=True, lacks_positions_unrotated=True),
    "hunyuan_v1_dense": HostAttention(key_norm="key_layernorm", norms_after_rotation=True),
    "hunyuan_v1_moe": HostAttention(key_norm="key_layernorm", norms_after_rotation=True),
    "jamba": HostAttention(rotary=None),
    "kimi_linear": HostAttention(rotary=None, is_latent=True),
    "kolibri1": _ROTATED_WHERE_SLIDING,
    "lara_mini": HostAttention(mixed_rotation=True, lacks_positions_unrotated=True, always_norms=True),
    "lfm2": HostAttention(key_norm="k_layernorm", always_norms=True),
    "lfm2_moe": HostAttention(key_norm="k_layernorm", always_norms=True),
    "lfm3": HostAttention(always_norms=True),
    "minicpm3": _LATENT,
    "nanochat": HostAttention(norms_after_rotation=True),
    "persimmon": HostAttention(key_norm="k_layernorm", num_leading_rotated="rotary_ndims", fuses_projections=True),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), HostAttention(always_norms=True)),
    "sarvam_mla": _LATENT,
    "smollm3": HostAttention(is_rotated=lambda attention: bool(attention.use_rope), mixed_rotation=True),
    "stablelm": HostAttention(key_norm="k_layernorm", num_leading_rotated="rotary_ndims"),
    "youtu": _LATENT,
}

_CHOOSES_KEYS = "an indexer selects the keys of each query, and only supports certain attention implementations"

#: Hosts that support connections but not MoDA -> the reason.
REFUSED_DEPTH_KV: dict[str, str] = {
    "axk2": _CHOOSES_KEYS,
    "deepseek_v32": _CHOOSES_KEYS,
    "diffllama": "its attention is the difference of two softmaxes",
    "dots3_note_text": "its sliding-window layers have heads of another number or size than the others, so that they "
    "cannot read each other's slots",
    "jetmoe": "each token selects its own query heads, for which the key-value heads are repeated",
    "minimax_m3_vl_text": _CHOOSES_KEYS,
    "mimo_v2_flash": "its sliding-window layers have key-value heads of another number or size than the others, so "
    "that they cannot read each other's slots",
}

_LATENT_VALUES = "values are expanded from a latent (multi-head latent attention), not computed by a v_proj"
_FUSED_VALUES = "one projection computes values together with keys or queries"

#: Hosts that do not support the value residual -> the reason.
REFUSED_VALUE_RESIDUAL: dict[str, str] = {
    **dict.fromkeys(("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT_VALUES),
    **dict.fromkeys(("glm4_moe_lite", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"), _LATENT_VALUES),
    **dict.fromkeys(("jetmoe", "persimmon", "phi3", "phi4_multimodal"), _FUSED_VALUES),
    "dots3_note_text": _LATENT_VALUES,
    "mimo_v2_flash": "its sliding-window layers have key-value heads of another number or size than the others",
}


def host_attention(model_type: str) -> HostAttention:
    """Return the table row of a host."""
    return _BY_MODEL_TYPE.get(model_type, _LLAMA)


def modelling_file(attention: nn.Module) -> ModuleType:
    """Return the host's modeling file, which contains the rotation and the eager attention function.

    Args:
        attention: the attention module.
    """
    return import_module(type(attention).__module__)


@dataclass(frozen=True)
class DepthKVShape:
    """Shape of a slot: number of heads, and channels per head of keys and values."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


def depth_kv_shape(host_config: PreTrainedConfig) -> DepthKVShape:
    """Return the shape of a slot in a host.

    Args:
        host_config: the host's config.
    """
    num_heads = host_config.num_attention_heads
    if host_attention(host_config.model_type).is_latent:
        key_dim = host_config.qk_nope_head_dim + host_config.qk_rope_head_dim
        return DepthKVShape(num_heads, key_dim, host_config.v_head_dim)
    head_dim = getattr(host_config, "head_dim", None) or host_config.hidden_size // num_heads
    return DepthKVShape(getattr(host_config, "num_key_value_heads", None) or num_heads, head_dim, head_dim)


def num_query_heads(host_config: PreTrainedConfig, layer_idx: int) -> int:
    """Return the number of query heads of a layer, which differs between the layers of Laguna."""
    per_layer = getattr(host_config, "num_attention_heads_per_layer", None)
    return host_config.num_attention_heads if per_layer is None else per_layer[layer_idx]


def rotations_differ(host_config: PreTrainedConfig) -> bool:
    """Return whether the layers of a host rotate keys differently, or only some layers rotate keys."""
    if host_attention(host_config.model_type).mixed_rotation:
        return True
    parameters = getattr(host_config, "rope_parameters", None)
    by_layer_type = parameters is not None and all(isinstance(value, dict) for value in parameters.values())
    return bool(by_layer_type) and len(set(getattr(host_config, "layer_types", None) or ())) > 1


class KeyRotation:
    """The rotary embedding of one attention module, applied to keys or queries [B, H, T, d], and its inverse.

    Args:
        host: the table row of the host.
        attention: the attention module, or the module that replaces it.
        host_config: the host's config.
    """

    def __init__(self, host: HostAttention, attention: nn.Module, host_config: PreTrainedConfig):
        self.num_last = host_config.qk_rope_head_dim if host.is_latent else None
        self.num_first = None if host.num_leading_rotated is None else getattr(attention, host.num_leading_rotated)
        self._may_lack_positions = host.lacks_positions_unrotated
        self._apply: Callable | None = None
        if host.rotary is not None and host.is_rotated(attention):
            # Hosts may have their own function: Bailing's rotates interleaved channels and returns Llama's order.
            self._apply = getattr(modelling_file(attention), host.rotary, apply_rotary_pos_emb)

    @property
    def rotates(self) -> bool:
        """Whether the module rotates keys."""
        return self._apply is not None

    def __call__(self, x: Tensor, position_embeddings, inverse: bool = False) -> Tensor:
        """Return the rotated tensor.

        Args:
            x: keys or queries, [B, H, T, d].
            position_embeddings: the position embeddings that the host's model passes to the layer.
            inverse: apply the inverse instead, including the inverse of the scale (YaRN, LongRoPE).
        """
        return self._run(x, position_embeddings, _inverted if inverse else None)

    def to_unrotated_keys(self, query: Tensor, position_embeddings) -> Tensor:
        """Return the query whose logits with unrotated keys equal those of a rotated query with rotated keys.

        This applies the transpose of the rotation, not its inverse: YaRN and LongRoPE scale queries and keys, so that
        logits contain the square of the scale.

        Args:
            query: the rotated query, [B, H, T, d].
            position_embeddings: the position embeddings that the host's model passes to the layer.
        """
        return self._run(query, position_embeddings, _transposed)

    def _run(self, x: Tensor, position_embeddings, change: Callable | None) -> Tensor:
        if self._apply is None or (position_embeddings is None and self._may_lack_positions):
            return x
        if position_embeddings is None:
            raise RuntimeError(
                "MoDA: the host's layers got no `position_embeddings`, which are needed to rotate keys. Call the "
                "model, not single layers."
            )
        if change is not None:
            position_embeddings = change(position_embeddings)
        if self.num_last is not None:
            rest, rotary = x.split((x.shape[-1] - self.num_last, self.num_last), -1)
            return torch.cat((rest, _rotated(self._apply, rotary, position_embeddings)), -1)
        if self.num_first is not None:
            rotary, rest = x.split((self.num_first, x.shape[-1] - self.num_first), -1)
            return torch.cat((_rotated(self._apply, rotary, position_embeddings), rest), -1)
        return _rotated(self._apply, x, position_embeddings)


def _rotated(rotate: Callable, x: Tensor, position_embeddings) -> Tensor:
    # The functions rotate query and key together. Replacements by other libraries (Liger) may work in place.
    if not rotate.__module__.startswith("transformers."):
        return rotate(x.clone(), x.clone(), *position_embeddings)[1]
    if isinstance(position_embeddings, Tensor):
        return rotate(x, x, position_embeddings)[1]
    return rotate(x, x, *position_embeddings)[1]


def _inverted(position_embeddings):
    """Return the position embeddings of the inverse; YaRN and LongRoPE also scale by sqrt(cos^2 + sin^2)."""
    if isinstance(position_embeddings, Tensor):
        return position_embeddings.reciprocal()
    cos, sin = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in position_embeddings)
    squared_scale = cos.square() + sin.square()
    return tuple((x / squared_scale).to(position_embeddings[0].dtype) for x in (cos, -sin))


def _transposed(position_embeddings):
    if isinstance(position_embeddings, Tensor):
        return position_embeddings.conj()
    cos, sin = position_embeddings
    return cos, -sin


class KeyNorm:
    """The key norm of one attention module, applied to keys [B, H, T, d].

    Args:
        host: the table row of the host.
        attention: the attention module.
    """

    def __init__(self, host: HostAttention, attention: nn.Module):
        self.name = host.key_norm if getattr(attention, host.key_norm, None) is not None else None

    def __call__(self, attention: nn.Module, key: Tensor) -> Tensor:
        """Return the normalised keys: per head or over all channels, as in the host; unchanged without a norm."""
        if self.name is None:
            return key
        norm = getattr(attention, self.name)
        weight = getattr(norm, "weight", None)
        if weight is None or weight.shape[-1] == key.shape[-1]:
            return norm(key)
        num_heads = key.shape[1]
        return norm(key.transpose(1, 2).flatten(2)).unflatten(2, (num_heads, -1)).transpose(1, 2)
