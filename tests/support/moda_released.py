"""The released language model of MoDA (hustvl/MoDA at 992a275, language_tasks/BlaGPT): its tensors, and golden logits.

The logits are those of the released modules in float64 (`MoDADepthScalingGPT`, backend "v14" with the reference of the
released kernel tests) with three layers of the sizes below and the weights of `released_weights`.
"""

import math

import torch
from torch import Tensor
from transformers import HYV3Config

from hf_depthattn import DepthAttnConfig

NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCAB_SIZE = 3, 24, 4, 2, 6, 13

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]
#: Logits of tokens 0, 3 and 7 for the first four entries of the vocabulary, and the norm of all logits.
LOGITS = [
    [-3.2988903943140664, -1.095804579037311, 0.9939005088630405, -2.6078376542364023],
    [0.14490640582254796, 0.049464951923571664, 3.74655210904877, -3.9911664986688398],
    [0.2061148984612513, -0.3538339307079079, 1.3014030726045849, 1.408033972554395],
]
NORM = 20.493987400791106


def released_weight(name: str, *shape: int) -> Tensor:
    """A tensor of the released model by its name, with values that any installation reproduces."""
    seed = sum((i + 1) * ord(character) for i, character in enumerate(name)) % 97
    squares = torch.arange(math.prod(shape), dtype=torch.float64) ** 2
    values = torch.cos(squares * (0.7 + 0.01 * seed) + seed).view(shape)
    if "norm" in name or ".ln_" in name:
        return 1 + 0.3 * values
    return values * (0.5 if name.endswith("weight") else 0.4)


def config() -> DepthAttnConfig:
    """The config of the same model in this library."""
    host = HYV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-8,
        attention_bias=True,
        mlp_bias=True,
        mlp_layer_types=["dense"] * NUM_LAYERS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return DepthAttnConfig.moda(
        host, norm_position="post", depth_key_rope="none", depth_key_norm="reader", depth_kv_bias=True
    )


def state_dict() -> dict[str, Tensor]:
    """The weights of the released model under the names of this library.

    Its rotation turns the other way: with both halves of each head swapped it is that of transformers.
    """
    width, hidden, d_kv = HIDDEN_SIZE, 2 * HIDDEN_SIZE, NUM_KV_HEADS * HEAD_DIM
    embedding = released_weight("transformer.wte.weight", VOCAB_SIZE, width)
    found = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    found["model.norm.weight"] = released_weight("transformer.ln_f.weight", width)
    for layer in range(NUM_LAYERS):
        old, new = f"transformer.h.{layer}", f"model.layers.{layer}"
        found[f"{new}.input_layernorm.weight"] = released_weight(f"{old}.ln_1.weight", width)
        found[f"{new}.post_attention_layernorm.weight"] = released_weight(f"{old}.ln_2.weight", width)
        for name in "qk":
            norm = released_weight(f"{old}.attn.{name}_norm.weight", HEAD_DIM)
            found[f"{new}.self_attn.{name}_norm.weight"] = _swapped(norm)
        for kind, columns in (("weight", lambda size: (size,)), ("bias", lambda size: ())):

            def fill(name: str, rows: int, size: int, old=old, kind=kind, columns=columns) -> Tensor:
                return released_weight(f"{old}.{name}.{kind}", rows, *columns(size))

            found[f"{new}.self_attn.q_proj.{kind}"] = _swapped(fill("attn.q_proj", width, width))
            found[f"{new}.self_attn.o_proj.{kind}"] = fill("attn.c_proj", width, width)
            for source, target in (("attn", "self_attn"), ("mlp", "mlp_depth_kv")):
                key, value = fill(f"{source}.kv_proj", 2 * d_kv, width).split(d_kv)
                if source == "attn" or layer < NUM_LAYERS - 1:  # nobody reads the last MLP's slot
                    found |= {f"{new}.{target}.k_proj.{kind}": _swapped(key), f"{new}.{target}.v_proj.{kind}": value}
            found[f"{new}.mlp.up_proj.{kind}"] = fill("mlp.c_fc", hidden, width)
            found[f"{new}.mlp.gate_proj.{kind}"] = fill("mlp.c_gate", hidden, width)
            found[f"{new}.mlp.down_proj.{kind}"] = fill("mlp.c_proj", width, hidden)
    return found


def _swapped(rows: Tensor) -> Tensor:
    """Swap the halves of every head along the first axis."""
    return rows.unflatten(0, (-1, 2, HEAD_DIM // 2)).flip(1).flatten(0, 2)
