"""Helpers of the tests of depth metrics: a Llama run layer by layer, models of every family, traces of hooks."""

import copy

import torch
from model_checks import depth_model, randomise_depth
from tiny_hosts import tiny_stock_model
from torch import Tensor, nn

from hf_depthattn import DepthAttnForCausalLM
from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.eval.metrics.probing.probe import DepthProbe

#: Label -> fields of `DepthAttnConfig` for models of this package.
DEPTH_FAMILIES = {
    "residual": {"connection": "residual"},
    "moda": {"connection": "residual", "depth_kv": "attention+mlp"},
    "full": {"connection": "attn_res", "sublayers_per_block": 1},
    "block": {"connection": "attn_res", "sublayers_per_block": 2},
    "block+moda": {"connection": "attn_res", "sublayers_per_block": 3, "depth_kv": "attention", "depth_gate": "head"},
}


def random_depth_model(family: str, **fields) -> DepthAttnForCausalLM:
    """Build a model of this package with random queries and gates."""
    model = depth_model(tiny_stock_model("llama"), **{**DEPTH_FAMILIES[family], **fields})
    randomise_depth(model)
    return model


#: Names of all connections, and fields that some need beside their name.
EVERY_CONNECTION = [str(name) for name in CONNECTIONS]
_CONNECTION_FIELDS = {"deepnorm": {"norm_position": "post"}}


def connection_model(
    connection: str, *, num_layers: int = 3, dtype: torch.dtype = torch.float32, **fields
) -> DepthAttnForCausalLM:
    """Build a model with a connection and perturbed depth parameters."""
    fields = {**_CONNECTION_FIELDS.get(connection, {}), **fields}
    model = depth_model(
        tiny_stock_model("llama", dtype, num_hidden_layers=num_layers), connection=connection, **fields
    )
    randomise_depth(model)
    return model


def run_by_hand(model: nn.Module, ids: Tensor, layers: list[nn.Module] | None = None) -> tuple[list[Tensor], Tensor]:
    """Return the states before and after the layers of a stock Llama, and its logits; `layers` replace its own."""
    decoder = model.model
    state = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = decoder.rotary_emb(state, positions)
    states = [state]
    for layer in decoder.layers if layers is None else layers:
        state = layer(state, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        states.append(state)
    return states, model.lm_head(decoder.norm(state))


def sublayers_by_hand(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return input h and output y of every sublayer of a stock Llama."""
    states, _ = run_by_hand(model, ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(states[0], positions)
    found = []
    for layer, state in zip(model.model.layers, states[:-1], strict=True):
        y, _ = layer.self_attn(layer.input_layernorm(state), attention_mask=None, position_embeddings=rotary)
        found.append((state, y))
        state = state + y
        found.append((state, layer.mlp(layer.post_attention_layernorm(state))))
    return found


def loss_by_hand(logits: Tensor, ids: Tensor) -> float:
    """Return the mean next-token cross-entropy."""
    log_p = logits[:, :-1].double().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).mean().item()


def traces(model: nn.Module) -> dict[str, object]:
    """Return everything except weights that a metric could leave changed in a model."""
    modules = dict(model.named_modules())
    return {
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "training": {name: m.training for name, m in modules.items()},
        "patched": [name for name, m in modules.items() if "forward" in vars(m)],
        "schedule": getattr(model.config, "attn_res_schedule", None),
        "blocks": [m.starts_block for m in modules.values() if hasattr(m, "starts_block")],
        "opened": [name for name, m in modules.items() if "open" in vars(getattr(m, "depth_kv", None) or m)],
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "weights": {name: p.data_ptr() for name, p in model.named_parameters()},
    }


def score_weight(model: nn.Module, site: int) -> Tensor:
    """Return the query of a site times its key-norm weight."""
    reads = model.get_decoder().depth_reads
    return reads.query[site] * reads.key_norm[site]


def close(actual, expected, tolerance=1e-5):
    """Return whether values are equal within a relative and absolute tolerance; NaN equals NaN."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@torch.no_grad()
def logits_of(model, ids):
    """Return the logits of one pass."""
    return model(ids, use_cache=False).logits


def without_layer(model, layer):
    """Return a copy of the model without a layer."""
    smaller = copy.deepcopy(model)
    del DepthProbe(smaller).layers[layer]
    config = smaller.config.get_text_config()
    # In Mamba's config, `layer_types` is a property.
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index != layer]
    config.num_hidden_layers -= 1
    return smaller


READ_OPTIONS = {
    "paper": {},
    "sum": {"read_scale": "sum"},
    "heads": {"num_depth_heads": 2},
    "sigmoid": {"depth_activation": "sigmoid"},
    "raw keys": {"key_norm": False},
    "input query": {"query": "input"},
    "static": {"static_mix": True, "num_depth_heads": 2},
    "static sum": {"static_mix": True, "read_scale": "sum"},
    "window": {"depth_window": 2},
}

OVERRIDES = {
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_neox": {"num_key_value_heads": None},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8},
}


HOST_FAMILIES = ["llama", "qwen3", "olmo2", "gemma2", "mixtral", "gpt2", "gpt_neox", "mamba2"]


def family_model(model_type: str) -> nn.Module:
    """Return a tiny stock model."""
    overrides = {key: value for key, value in OVERRIDES.get(model_type, {}).items() if value is not None}
    return tiny_stock_model(model_type, **overrides)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine over the last dimension."""
    return torch.cosine_similarity(x, y, dim=-1)
