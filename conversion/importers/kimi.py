"""AttnRes under the names of Kimi K3, on the host `kimi_linear`."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from .config_fields import ConfigFields
from .foreign_checkpoint import ForeignCheckpoint, ImportPlan
from .tensor_map import ReadNames, TensorMap

NAME = "kimi"
PROJECT = "Kimi"

_HOST = "kimi_linear"
# Parts of Kimi K3 that the host does not have.
_OF_K3 = ("mla_use_output_gate", "routed_expert_hidden_size", "use_full_rank_gate")
# Values with which the host computes what the code of the published Kimi Linear computes; it has no rotation.
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_OF_K3, (False,)),
    "mla_use_nope": (True,),
    "moe_layer_freq": (1,),
    "moe_router_activation_func": ("sigmoid",),
    "rope_parameters": (),
    "rope_scaling": (),
    "topk_method": ("noaux_tc",),
}
# Sizes that the host computes from others, and the base of a rotation that there is not.
_IGNORED = ("head_dim", "qk_head_dim", "rope_theta")
_LINEAR_ATTENTION = "linear_attn_config"
_IN_LINEAR_ATTENTION = ("full_attn_layers", "head_dim", "kda_layers", "num_heads", "short_conv_kernel_size")
_LAYERS = "model.layers."
_READS = ReadNames(
    ("self_attention_res_proj", "self_attention_res_norm"),
    ("mlp_res_proj", "mlp_res_norm"),
    ("model.output_attn_res_proj", "model.output_attn_res_norm"),
)


def has_queries(foreign: ForeignCheckpoint) -> bool:
    """Return whether a checkpoint has queries under the names of Kimi K3."""
    return any(f".{_READS.attention[0]}." in name for name in foreign.entries)


def recognises(foreign: ForeignCheckpoint) -> bool:
    """Return whether the checkpoint has such queries on the host."""
    return foreign.config.get("model_type") == _HOST and has_queries(foreign)


def unsupported_model(foreign: ForeignCheckpoint) -> UserError:
    """Return the error for a checkpoint with such queries on another model, such as Kimi K3 itself."""
    model_type = foreign.config.get("model_type")
    return UserError(
        f"{foreign.folder}: model_type {model_type!r} has no host in transformers: {_HOST!r} lacks the activation, "
        f"the latent experts and the gates of Kimi K3. Only AttnRes on {_HOST!r} can be imported."
    )


def plan(foreign: ForeignCheckpoint) -> ImportPlan:
    """Return what the checkpoint becomes: AttnRes on `kimi_linear`.

    Raises:
        UserError: if it has parts that the host does not have, or a field is not known here.
    """
    folder = foreign.folder
    fields = ConfigFields(folder, foreign.config)
    num_decoder_layers = fields.integer("attn_res_block_size")
    for name, allowed in _ONLY.items():
        fields.only(name, *allowed)
    fields.ignore(*_IGNORED)
    host = fields.host(_HOST, "first_k_dense_replace", _LINEAR_ATTENTION)
    linear_attention = fields.part(_LINEAR_ATTENTION)
    linear_attention.ignore(*_IN_LINEAR_ATTENTION)
    linear_attention.finish()
    if host.n_group != 1:
        # With one group, experts are chosen among all of them in any case.
        fields.only("use_grouped_topk", True)
    fields.ignore("use_grouped_topk")
    fields.ignore_fields_of_every_config()
    fields.finish()

    num_layers = host.num_hidden_layers
    tensors = TensorMap(foreign)
    tensors.reads(_READS.of_sites(_LAYERS, num_layers), host.hidden_size)
    if host.tie_word_embeddings:
        tensors.drop("lm_head.weight", "tied to the embeddings")
    # The host's own tensors keep their names; those that its model does not have are found afterwards.
    for name in tensors.rest():
        tensors.copy(name, name)
    options = {"sublayers_per_block": min(2 * num_decoder_layers, 2 * num_layers)}
    return ImportPlan(host, options, tensors.tensors, tensors.dropped)
