r"""Mixture-of-Depths Attention (MoDA): keys and values that sublayers write and that attention in later layers reads.

Paper: arXiv 2603.15619. A *slot* is a key and a value for every token. The `DepthState` contains the slots in the
order in which sublayers write them, in addition to the sources of the connection:

    state.depth_keys    [ attn 0 | mlp 0 | attn 1 | ... | mlp l-1 ]        each [B, Hk, T, d]
                                        |
      h --> norm --> self_attn:  softmax over (keys of the sequence, slots of the own token) --> out
                          |
                          +--> own K, V are slot "attn l"                  (no parameters)

      h --> norm --+--> mlp --> out
                   |
                   +--> mlp_depth_kv.k_proj, .v_proj are slot "mlp l"      (depth_kv="attention+mlp")

With AttnRes, a sublayer's input h is first read from the sources; the slot is computed from the same normalised h as
the sublayer's output; the output is then written to the sources.

    sources --AttnRes read--> h --> norm --> sublayer (reads slots; writes a slot) --> y --AttnRes write--> sources

Keys are stored in the form that needs the least work when they are read:

|`depth_key_rope`|`depth_key_norm`|layers rotate  |stored keys          |query for the slots|
|----------------|----------------|---------------|---------------------|-------------------|
|`same_position` |`writer`        |all alike      |as in the sequence   |as in the sequence |
|`same_position` |`writer`        |differently    |rotation undone      |rotation undone    |
|`same_position` |`reader`        |either         |raw; normed by reader|rotation undone    |
|`none`          |`writer`        |either         |rotation undone      |as in the sequence |
|`none`          |`reader`        |either         |raw; normed by reader|as in the sequence |

Query and slot have the same position, so equal rotations cancel: the first three rows have the same logits (apart from
the norm), which do not depend on the absolute position. With `reader`, the host's `k_proj` runs a second time to
compute keys without norm; dropout in a LoRA layer on it then has another mask.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache

from .cache_name import cache_of
from .configuration_depthattn import DepthAttnConfig
from .depth_options import DepthKeyNormType, DepthKeyRope
from .depth_state import DepthState
from .float32_module import Float32Module
from .host_attention import (
    KeyNorm,
    KeyRotation,
    depth_kv_shape,
    host_attention,
    modelling_file,
    num_query_heads,
    rotations_differ,
)
from .moda_attention import DepthExchange
from .parallel_styles import LOCAL_PARAMETERS

#: Names of MoDA's modules in a decoder layer.
DEPTH_KV_MODULES = ("attn_depth_kv", "mlp_depth_kv")


class DepthGate(Float32Module):
    """The gate of one layer: `out = o_seq + gate_h (o_joint - o_seq)` for every query head h.

    Initialised to zero, which is the host's attention exactly but has a nonzero gradient. It stays float32 under casts
    to half precision and has no weight decay.

    Args:
        num_heads: number of query heads of the layer.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(num_heads, dtype=torch.float32))

    def init_parameters(self, init) -> None:
        """Initialise the gate.

        Args:
            init: the module `transformers.initialization`.
        """
        init.zeros_(self.gate)

    def forward(self) -> Tensor:
        # A copy, since FSDP2 frees the parameter after this forward, before the attention function uses the gate.
        return self.gate.clone()


class MLPDepthKV(nn.Module):
    """Projections of an MLP sublayer's input to the key and value of a slot; with biases if `depth_kv_bias` is set.

    Args:
        config: the model's config.
    """

    def __init__(self, config: DepthAttnConfig):
        super().__init__()
        shape = depth_kv_shape(config.host_config)
        self.key_dim, self.value_dim = shape.key_dim, shape.value_dim
        bias = config.depth_kv_bias
        self.k_proj = nn.Linear(config.hidden_size, shape.num_kv_heads * shape.key_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shape.num_kv_heads * shape.value_dim, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project `x` [B, T, D] to a key [B, Hk, T, d] and a value [B, Hk, T, dv]."""
        # The number of heads is inferred, since tensor parallelism splits them between devices.
        key = self.k_proj(x).unflatten(-1, (-1, self.key_dim)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        return key, value


def depth_kv_modules(config: DepthAttnConfig, layer_idx: int) -> dict[str, DepthGate | MLPDepthKV]:
    """Return the modules of MoDA that a decoder layer needs, by their names in it.

    Args:
        config: the model's config.
        layer_idx: index of the layer.
    """
    plan = config.depth_slot_plan
    modules: dict[str, DepthGate | MLPDepthKV] = {}
    if plan.num_read[layer_idx] and config.depth_gate is not None:
        modules["attn_depth_kv"] = DepthGate(num_query_heads(config.host_config, layer_idx))
    if layer_idx in plan.mlp_writes:
        modules["mlp_depth_kv"] = MLPDepthKV(config)
    return modules


def depth_kv_tp_plan(config: DepthAttnConfig, host_plan: dict[str, str]) -> dict[str, str]:
    """Return the tensor-parallel plan of MoDA's modules, which follows that of the host's key projection.

    Args:
        config: the model's config.
        host_plan: the plan of the host's base model.
    """
    of_keys = ("layers.*.self_attn.k_proj", "layers.*.self_attn.kv_b_proj")
    style = next((host_plan[name] for name in of_keys if name in host_plan), None)
    if style is None or config.depth_kv is None:
        return {}
    plan = {}
    if config.depth_slot_plan.mlp_writes:
        plan = {f"layers.*.mlp_depth_kv.{name}_proj": style for name in ("k", "v")}
    if style == "colwise" and config.depth_gate is not None:
        # With other styles, keys are gathered and attention runs on all heads on every device; so does the gate.
        plan |= {"layers.*.attn_depth_kv": LOCAL_PARAMETERS, "layers.*.attn_depth_kv.gate": style}
    return plan


class LayerDepthKV:
    """Reads and writes slots in one decoder layer; it has no parameters and no state.

    Args:
        config: the model's config.
        attention: the layer's attention module.
        layer_idx: index of the layer.
    """

    def __init__(self, config: DepthAttnConfig, attention: nn.Module, layer_idx: int):
        plan = config.depth_slot_plan
        present, later = plan.present(layer_idx), plan.present(layer_idx + 1)
        # Positions in the depth state: of the slots that this layer reads, and of those that later layers read.
        self.read = tuple(present.index(slot) for slot in plan.reads[layer_idx])
        self.kept = tuple(position for position, slot in enumerate(present) if slot in later)
        self.drops_slots = len(self.kept) < len(present)
        self.attention_writes = layer_idx in plan.attention_writes
        self.key_dim = depth_kv_shape(config.host_config).key_dim
        host = host_attention(config.host_config.model_type)
        self.norm = KeyNorm(host, attention)
        self.norms_after_rotation = host.norms_after_rotation
        self.takes_part = bool(self.read) or self.attention_writes
        self.rotation = KeyRotation(host, attention, config.host_config)
        norms = self.norm.name is not None or host.always_norms
        self.reader_norms = config.depth_key_norm == DepthKeyNormType.READER and norms
        same_position = config.depth_key_rope == DepthKeyRope.SAME_POSITION
        self.stores_rotated = same_position and not self.reader_norms and not rotations_differ(config.host_config)
        self.unrotates_query = same_position and not self.stores_rotated
        if self.takes_part:
            self.stock_attention = modelling_file(attention).eager_attention_forward

    def open(
        self,
        state: DepthState,
        attention: nn.Module,
        gate: nn.Module | None,
        kwargs: dict,
        num_tokens: int,
        return_weights: bool,
    ) -> DepthExchange | None:
        """Return the slots that the attention of this layer reads; `None` if it neither reads nor writes slots.

        Args:
            state: the depth state.
            attention: the layer's attention module.
            gate: the layer's `DepthGate`, if it has one.
            kwargs: the arguments that the host passes to its attention.
            num_tokens: number of tokens of the attention module's input.
            return_weights: whether to record the weights of the slots.
        """
        if not self.takes_part:
            return None
        keys = tuple(state.depth_keys[position] for position in self.read)
        if self.reader_norms:
            keys = tuple(self.norm(attention, key) for key in keys)
        position_embeddings = kwargs.get("position_embeddings")
        rotation = self.rotation

        def unrotated(query: Tensor) -> Tensor:
            return rotation.to_unrotated_keys(query, position_embeddings)

        return DepthExchange(
            keys,
            tuple(state.depth_values[position] for position in self.read),
            gate=None if gate is None else gate(),
            to_depth_query=unrotated if self.unrotates_query and rotation.rotates else None,
            first_key=_first_key(cache_of(kwargs), attention, num_tokens),
            stock_attention=self.stock_attention,
            return_weights=return_weights,
        )

    def write_attention(
        self, state: DepthState, exchange: DepthExchange | None, attention: nn.Module, x: Tensor, kwargs: dict
    ) -> DepthState:
        """Return the state after the attention has run: with its slot, and without those that no later layer reads.

        Args:
            state: the depth state.
            exchange: the result of `open`.
            attention: the layer's attention module.
            x: the input of the attention module, [B, T, D].
            kwargs: the arguments that the host passes to its attention.
        """
        if exchange is None:
            return state
        if self.drops_slots:
            state = state._replace(
                depth_keys=tuple(state.depth_keys[position] for position in self.kept),
                depth_values=tuple(state.depth_values[position] for position in self.kept),
            )
        if not self.attention_writes:
            return state
        assert exchange.own is not None, "the attention function has run"
        key, value = exchange.own
        if self.reader_norms:
            key = cast(nn.Module, attention.k_proj)(x).unflatten(-1, (-1, self.key_dim)).transpose(1, 2)
        elif not self.stores_rotated:
            key = self.rotation(key, kwargs.get("position_embeddings"), inverse=True)
        return _written(state, key, value)

    def write_mlp(
        self, state: DepthState, projections: MLPDepthKV, attention: nn.Module, x: Tensor, kwargs: dict
    ) -> DepthState:
        """Return the state with the slot of this layer's MLP.

        Args:
            state: the depth state.
            projections: the layer's `mlp_depth_kv`.
            attention: the layer's attention module, whose norm and rotation are applied to the key.
            x: the input of the MLP, [B, T, D].
            kwargs: the arguments that the host passes to its attention.
        """
        key, value = projections(x)
        writer_norms = not self.reader_norms
        if writer_norms and not self.norms_after_rotation:
            key = self.norm(attention, key)
        if self.stores_rotated:
            key = self.rotation(key, kwargs.get("position_embeddings"))
        if writer_norms and self.norms_after_rotation:
            key = self.norm(attention, key)
        return _written(state, key, value)


def _written(state: DepthState, key: Tensor, value: Tensor) -> DepthState:
    return state._replace(depth_keys=(*state.depth_keys, key), depth_values=(*state.depth_values, value))


def _first_key(cache: Cache | PagedAttentionCache | None, attention: nn.Module, num_tokens: int) -> int | Tensor:
    """Return the index of this call's first token in the keys that the cache will return; unused with paged caches."""
    if cache is None or isinstance(cache, PagedAttentionCache):
        return 0
    layer_idx = cast(int, attention.layer_idx)
    _, offset = cache.get_mask_sizes(num_tokens, layer_idx)
    # Static caches have their length in a tensor that they change in place; the difference is a new tensor.
    return cache.get_seq_length(layer_idx) - offset
