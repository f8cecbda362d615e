"""How the attention modules of hosts make their keys: what MoDA needs to know beside the attention interface.

MoDA sees the keys of an attention sublayer as they enter attention: normalised and rotated. To bring keys of the MLP
sublayers into the same form, or keys into an unrotated one, it applies the host's own norm and rotation. One row of
data per family; a host without a row is like Llama.
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
    """The making of keys in a family of hosts.

    Attributes:
        rotary: name of the rotation in the host's modelling file, `None` for hosts without rotary embeddings.
        is_rotated: whether an attention module of this family rotates; some do so in sliding-window layers only.
        mixed_rotation: whether layers of one model differ in that.
        key_norm: name of the module that normalises keys, where there is one.
        norms_after_rotation: the order of the two.
        is_latent: multi-head latent attention: keys and values are expanded from a latent to all heads, and only the
            last `qk_rope_head_dim` channels of a key are rotated.
        lacks_positions_unrotated: layers that do not rotate are given no position embeddings.
        num_leading_rotated: attribute of an attention module with the number of channels it rotates, the first ones of
            a key; `None` where the rotation itself knows.
        fuses_projections: queries, keys and values come from one projection, so there are no keys before their norm.
        always_norms: every attention module normalises keys, also for layers that have none themselves.
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
    # Layers that rotate may differ in their base.
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

_CHOOSES_KEYS = "an indexer chooses the keys of each query, for attention functions that it knows by name"

#: Hosts that a connection can have but MoDA cannot, and why.
REFUSED_DEPTH_KV: dict[str, str] = {
    "axk2": _CHOOSES_KEYS,
    "deepseek_v32": _CHOOSES_KEYS,
    "diffllama": "its attention is a difference of two softmaxes, which have no common set of weights",
    "dots3_note_text": "its sliding-window layers have heads of another number or size than the others, so that a "
    "slot written in one cannot be read in the other",
    "jetmoe": "each token chooses its own query heads, for which the key-value heads are repeated",
    "minimax_m3_vl_text": _CHOOSES_KEYS,
    "mimo_v2_flash": "its sliding-window layers have key-value heads of another number or size than the others, so "
    "that a slot written in one cannot be read in the other",
}


def host_attention(model_type: str) -> HostAttention:
    """The row of a host."""
    return _BY_MODEL_TYPE.get(model_type, _LLAMA)


def modelling_file(attention: nn.Module) -> ModuleType:
    """The host's modelling file, of which an attention module uses functions that are attributes of nothing else.

    Args:
        attention: the attention module.
    """
    return import_module(type(attention).__module__)


@dataclass(frozen=True)
class DepthKVShape:
    """Sizes of a depth slot: `num_kv_heads` heads, keys of `key_dim` and values of `value_dim` channels."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


def depth_kv_shape(host_config: PreTrainedConfig) -> DepthKVShape:
    """The sizes of a depth slot in a host.

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
    """Query heads of a layer; Laguna's differ."""
    per_layer = getattr(host_config, "num_attention_heads_per_layer", None)
    return host_config.num_attention_heads if per_layer is None else per_layer[layer_idx]


def rotations_differ(host_config: PreTrainedConfig) -> bool:
    """Whether a model of this host has layers that rotate in different ways, or some that do not rotate."""
    if host_attention(host_config.model_type).mixed_rotation:
        return True
    parameters = getattr(host_config, "rope_parameters", None)
    by_layer_type = parameters is not None and all(isinstance(value, dict) for value in parameters.values())
    return bool(by_layer_type) and len(set(getattr(host_config, "layer_types", None) or ())) > 1


class KeyRotation:
    """The rotation of one attention module, applied to keys or queries [B, H, T, d], and its inverse.

    Args:
        host: the row of the host.
        attention: the attention module (or what a layer has in its place), of which the modelling file is used.
        host_config: the host's config.
    """

    def __init__(self, host: HostAttention, attention: nn.Module, host_config: PreTrainedConfig):
        self.num_last = host_config.qk_rope_head_dim if host.is_latent else None
        self.num_first = None if host.num_leading_rotated is None else getattr(attention, host.num_leading_rotated)
        self._may_lack_positions = host.lacks_positions_unrotated
        self._apply: Callable | None = None
        if host.rotary is not None and host.is_rotated(attention):
            # Bailing's own takes interleaved channels and gives them in Llama's order.
            self._apply = getattr(modelling_file(attention), host.rotary, apply_rotary_pos_emb)

    @property
    def rotates(self) -> bool:
        """Whether the module rotates at all."""
        return self._apply is not None

    def __call__(self, x: Tensor, position_embeddings, inverse: bool = False) -> Tensor:
        """Rotate.

        Args:
            x: [B, H, T, d].
            position_embeddings: what the host's model passes to the layer.
            inverse: turn back instead, and divide by the scale.
        """
        return self._run(x, position_embeddings, _inverted if inverse else None)

    def to_unrotated_keys(self, query: Tensor, position_embeddings) -> Tensor:
        """The query that gives the same logits with unrotated keys as this one with rotated keys.

        The transpose of the rotation, not its inverse: YaRN and LongRoPE scale queries and keys, so that logits have
        the square of the scale.

        Args:
            query: [B, H, T, d], rotated.
            position_embeddings: as above.
        """
        return self._run(query, position_embeddings, _transposed)

    def _run(self, x: Tensor, position_embeddings, change: Callable | None) -> Tensor:
        if self._apply is None or (position_embeddings is None and self._may_lack_positions):
            return x
        if position_embeddings is None:
            raise RuntimeError(
                "MoDA: the host's layers get no `position_embeddings`, which its keys are rotated with."
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
    # The host's functions take query and key together. What other libraries put in their place (Liger) may rotate the
    # tensors they are given.
    if not rotate.__module__.startswith("transformers."):
        return rotate(x.clone(), x.clone(), *position_embeddings)[1]
    if isinstance(position_embeddings, Tensor):
        return rotate(x, x, position_embeddings)[1]
    return rotate(x, x, *position_embeddings)[1]


def _inverted(position_embeddings):
    """Position embeddings of the inverse rotation; YaRN and LongRoPE also scale by sqrt(cos^2 + sin^2)."""
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
        host: the row of the host.
        attention: the attention module.
    """

    def __init__(self, host: HostAttention, attention: nn.Module):
        self.name = host.key_norm if getattr(attention, host.key_norm, None) is not None else None

    def __call__(self, attention: nn.Module, key: Tensor) -> Tensor:
        """Normalise, each head by itself or all channels together, as the host does; as it is without a norm."""
        if self.name is None:
            return key
        norm = getattr(attention, self.name)
        weight = getattr(norm, "weight", None)
        if weight is None or weight.shape[-1] == key.shape[-1]:
            return norm(key)
        num_heads = key.shape[1]
        return norm(key.transpose(1, 2).flatten(2)).unflatten(2, (num_heads, -1)).transpose(1, 2)
