"""AttnRes on Kimi Linear in float64, written from the equations of the papers, with the tensors of its checkpoints.

Papers: 2510.26692 (Kimi Delta Attention, latent attention without rotation, experts), 2603.15031 Eq. 2-6. Epsilons are
those of the published code: 1e-5 of norms, 1e-6 of the latent's norm and of the lengths of queries and keys.
"""

from dataclasses import dataclass

import torch
from foreign_models import IDS, ForeignModel
from moda_released import released_weight
from moda_slow_model import rms
from torch import Tensor, nn

EPS, SMALL_EPS = 1e-5, 1e-6
NUM_LAYERS, WIDTH, VOCAB_SIZE, NUM_HEADS, HEAD_DIM, KERNEL = 3, 24, 23, 4, 6, 4
LATENT, NOPE, ROPE, MLP_WIDTH, EXPERT_WIDTH, NUM_EXPERTS, TOP_K, SCALING = 8, 4, 2, 40, 16, 5, 2, 2.446
# Layers with delta attention, counted from 0; the others have latent attention.
DELTA = (0, 2)


@dataclass
class KimiModel(ForeignModel):
    """Three layers: delta attention, latent attention, delta attention; experts in all but the first.

    Attributes:
        attn_res_block_size: number of decoder layers per block.
    """

    hidden_size: int = WIDTH
    attn_res_block_size: int = 1

    def __post_init__(self):
        self.sublayers_per_block, self.eps = 2 * self.attn_res_block_size, {"block": EPS}
        self.tensors = {name: released_weight(name, *shape).float() for name, shape in _shapes().items()}

    def tensor(self, name: str) -> Tensor:
        """Queries and key norms are in bfloat16 in the checkpoints."""
        return super().tensor(name).bfloat16().float()

    def of(self, name: str) -> Tensor:
        return self.tensors[name].double()

    def logits(self, ids: Tensor = IDS) -> Tensor:
        sources, partial = [], self.of("model.embed_tokens.weight")[ids]
        for site in range(2 * NUM_LAYERS):
            layer, is_mlp = divmod(site, 2)
            prefix = f"model.layers.{layer}."
            norm = "post_attention_layernorm" if is_mlp else "input_layernorm"
            x = rms(self.read(site, sources, partial), self.of(f"{prefix}{norm}.weight"), EPS)
            if is_mlp:
                y = self.experts(f"{prefix}block_sparse_moe.", x) if layer else self.swiglu(prefix, x)
            else:
                y = (self.delta_attention if layer in DELTA else self.latent_attention)(f"{prefix}self_attn.", x)
            if site % self.sublayers_per_block == 0:
                sources, partial = [*sources, partial], y
            else:
                partial = partial + y
        h = rms(self.read(2 * NUM_LAYERS, sources, partial), self.of("model.norm.weight"), EPS)
        return h @ self.of("lm_head.weight").T

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.of(f"{name}.weight").T

    def delta_attention(self, prefix: str, x: Tensor) -> Tensor:
        query, key, value = (self.convolved(prefix, name, x) for name in "qkv")
        query, key = (each / (each.square().sum(-1, keepdim=True) + SMALL_EPS).sqrt() for each in (query, key))
        low_rank = {
            name: self.linear(f"{prefix}{name}_b_proj", self.linear(f"{prefix}{name}_a_proj", x)) for name in "fg"
        }
        decay = nn.functional.softplus(low_rank["f"] + self.of(f"{prefix}dt_bias")).unflatten(-1, (NUM_HEADS, -1))
        decay = (-self.of(f"{prefix}A_log").exp().view(NUM_HEADS, 1) * decay).exp()
        strength = self.linear(f"{prefix}b_proj", x).sigmoid()
        state = torch.zeros(*x.shape[:1], NUM_HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t, :, :, None] * state
            error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
            state = state + strength[:, t, :, None, None] * key[:, t, :, :, None] * error[:, :, None]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * HEAD_DIM**-0.5)
        normed = rms(torch.stack(outputs, 1), self.of(f"{prefix}o_norm.weight"), EPS)
        gated = normed * low_rank["g"].unflatten(-1, (NUM_HEADS, -1)).sigmoid()
        return self.linear(f"{prefix}o_proj", gated.flatten(2))

    def convolved(self, prefix: str, name: str, x: Tensor) -> Tensor:
        """Return a projection, mixed over the last four tokens in every channel, `[B, T, H, d]`."""
        flat = nn.functional.pad(self.linear(f"{prefix}{name}_proj", x), (0, 0, KERNEL - 1, 0))
        weight = self.of(f"{prefix}{name}_conv1d.weight")[:, 0]
        mixed = sum(weight[:, i] * flat[:, i : i + x.shape[1]] for i in range(KERNEL))
        return nn.functional.silu(mixed).unflatten(-1, (NUM_HEADS, -1))

    def latent_attention(self, prefix: str, x: Tensor) -> Tensor:
        query = self.linear(f"{prefix}q_proj", x).unflatten(-1, (NUM_HEADS, -1))
        latent, shared = self.linear(f"{prefix}kv_a_proj_with_mqa", x).split([LATENT, ROPE], -1)
        latent = rms(latent, self.of(f"{prefix}kv_a_layernorm.weight"), SMALL_EPS)
        key, value = (
            self.linear(f"{prefix}kv_b_proj", latent).unflatten(-1, (NUM_HEADS, -1)).split([NOPE, HEAD_DIM], -1)
        )
        key = torch.cat([key, shared[:, :, None].expand(-1, -1, NUM_HEADS, -1)], -1)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (NOPE + ROPE) ** -0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.linear(f"{prefix}o_proj", torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))

    def swiglu(self, prefix: str, x: Tensor) -> Tensor:
        names = (f"{prefix}block_sparse_moe.{name}_proj" for name in ("gate", "up", "down"))
        return self.gated_mlp(x, *names)

    def gated_mlp(self, x: Tensor, gate: str, up: str, down: str) -> Tensor:
        return self.linear(down, nn.functional.silu(self.linear(gate, x)) * self.linear(up, x))

    def experts(self, prefix: str, x: Tensor) -> Tensor:
        scores = self.linear(f"{prefix}gate", x).sigmoid()
        chosen = (scores + self.of(f"{prefix}gate.e_score_correction_bias")).topk(TOP_K, -1).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        weights = SCALING * weights / weights.sum(-1, keepdim=True)
        y = self.gated_mlp(x, *(f"{prefix}shared_experts.{name}_proj" for name in ("gate", "up", "down")))
        for i in range(NUM_EXPERTS):
            y = y + weights[..., i, None] * self.gated_mlp(x, *(f"{prefix}experts.{i}.w{n}" for n in (1, 3, 2)))
        return y


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors but queries and key norms, by their names in checkpoints."""
    kv = NUM_HEADS * HEAD_DIM
    delta = {
        **{f"{name}_proj.weight": (kv, WIDTH) for name in "qkv"},
        **{f"{name}_conv1d.weight": (kv, 1, KERNEL) for name in "qkv"},
        **{f"{name}_a_proj.weight": (HEAD_DIM, WIDTH) for name in "fg"},
        **{f"{name}_b_proj.weight": (kv, HEAD_DIM) for name in "fg"},
        "A_log": (1, 1, NUM_HEADS, 1),
        "dt_bias": (kv,),
        "b_proj.weight": (NUM_HEADS, WIDTH),
        "o_norm.weight": (HEAD_DIM,),
        "o_proj.weight": (WIDTH, kv),
    }
    latent = {
        "q_proj.weight": (NUM_HEADS * (NOPE + ROPE), WIDTH),
        "kv_a_proj_with_mqa.weight": (LATENT + ROPE, WIDTH),
        "kv_a_layernorm.weight": (LATENT,),
        "kv_b_proj.weight": (NUM_HEADS * (NOPE + HEAD_DIM), LATENT),
        "o_proj.weight": (WIDTH, kv),
    }
    dense = {"gate_proj.weight": (MLP_WIDTH, WIDTH), "up_proj.weight": (MLP_WIDTH, WIDTH)}
    dense |= {"down_proj.weight": (WIDTH, MLP_WIDTH)}
    sparse = {"gate.weight": (NUM_EXPERTS, WIDTH), "gate.e_score_correction_bias": (NUM_EXPERTS,)}
    names = [("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj")]
    names += [tuple(f"experts.{i}.w{n}" for n in (1, 3, 2)) for i in range(NUM_EXPERTS)]
    for gate, up, down in names:
        sparse |= dict.fromkeys((f"{gate}.weight", f"{up}.weight"), (EXPERT_WIDTH, WIDTH))
        sparse[f"{down}.weight"] = (WIDTH, EXPERT_WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (WIDTH,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB_SIZE, WIDTH))
    for layer in range(NUM_LAYERS):
        parts = {"self_attn.": delta if layer in DELTA else latent, "block_sparse_moe.": sparse if layer else dense}
        parts[""] = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (WIDTH,))
        for part, own in parts.items():
            shapes |= {f"model.layers.{layer}.{part}{name}": shape for name, shape in own.items()}
    return shapes


def config(model: KimiModel) -> dict:
    """Return the config, with the fields of the published Kimi Linear."""
    return {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "attn_res_block_size": model.attn_res_block_size,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": MLP_WIDTH,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "head_dim": 72,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "kv_lora_rank": LATENT,
        "q_lora_rank": None,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": HEAD_DIM,
        "mla_use_nope": True,
        "linear_attn_config": {
            "head_dim": HEAD_DIM,
            "num_heads": NUM_HEADS,
            "short_conv_kernel_size": KERNEL,
            "kda_layers": [layer + 1 for layer in DELTA],
            "full_attn_layers": [layer + 1 for layer in range(NUM_LAYERS) if layer not in DELTA],
        },
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_token": TOP_K,
        "num_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "topk_group": 1,
        "use_grouped_topk": True,
        "routed_scaling_factor": SCALING,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "model_max_length": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        "transformers_version": "4.56.1",
        "use_cache": True,
    }
