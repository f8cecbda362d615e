"""Independent float64 implementation of a decoder with MoDA, which only takes weights from the package.

It follows the papers' equations (2603.15619 section 3; 2603.15031 Eq. 2-6) and the conventions of this project: slot
order, key rotation, key norm, gate, window, post-norm, AttnRes, value residual. Hosts: llama, qwen3 (key norm per
head), olmo2 (key norm over all heads, norms after the sublayers).
"""

import torch
from moda_oracles import loop_moda
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Apply rotary embeddings to [B, H, T, d] as a product of complex numbers."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, :, None] * frequency)
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)


class SlowModel:
    """Runs the weights of a `DepthAttnForCausalLM` in float64 on one of the three hosts."""

    def __init__(self, model):
        self.config = model.config
        self.host = model.config.text_config
        self.weights = {name: p.detach().double() for name, p in model.state_dict().items()}

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.layers.{layer}.{name}"]

    def has(self, layer: int, name: str) -> bool:
        return f"model.layers.{layer}.{name}" in self.weights

    def heads(self, flat: Tensor, num_heads: int) -> Tensor:
        return flat.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def key_norm(self, layer: int, key: Tensor, name: str = "k_norm") -> Tensor:
        """Apply the key norm of a layer to [B, H, T, d], per head or over all heads by the size of its weight."""
        if not self.has(layer, f"self_attn.{name}.weight"):
            return key
        weight = self.weight(layer, f"self_attn.{name}.weight")
        if weight.shape[0] == key.shape[-1]:
            return rms(key, weight, self.host.rms_norm_eps)
        flat = key.transpose(1, 2).flatten(2)
        return self.heads(rms(flat, weight, self.host.rms_norm_eps), key.shape[1])

    def stored_key(self, layer: int, raw: Tensor) -> Tensor:
        """Return a slot's key before rotation: with the writer's norm, or without norm for the reader's."""
        return self.key_norm(layer, raw) if self.config.depth_key_norm == "writer" else raw

    def read(self, site: int, state: dict) -> Tensor:
        """Return the input of a sublayer: the residual stream, or an AttnRes read."""
        if self.config.connection == "residual":
            return state["partial"]
        sources = [*state["sources"], state["partial"]] if state["partial"] is not None else state["sources"]
        query, norm = (self.weights[f"model.depth_reads.{name}"][site] for name in ("query", "key_norm"))
        logits = torch.stack(
            [(query * rms(v, norm, self.config.resolved_depth_norm_eps)).sum(-1) for v in sources], -1
        )
        mix = sum(p[..., None] * v for p, v in zip(logits.softmax(-1).unbind(-1), sources, strict=True))
        return mix * len(sources) if self.config.read_scale == "sum" else mix

    def write(self, site: int, layer: int, norm: str, state: dict, y: Tensor) -> None:
        if self.config.connection == "residual":
            state["partial"] = state["partial"] + y
            if self.config.norm_position == "post":
                state["partial"] = rms(state["partial"], self.weight(layer, norm), self.host.rms_norm_eps)
        elif site % self.config.block_size_sublayers == 0:
            state["sources"].append(state["partial"])
            state["partial"] = y
        else:
            state["partial"] = state["partial"] + y

    def mixed_value(self, layer: int, value: Tensor, first_value: Tensor | None) -> Tensor:
        """Return the values with a value residual (2410.17897)."""
        if layer == 0 or not self.config.value_residual:
            return value
        first, own = (self.weight(layer, f"value_residual.{name}_scale") for name in ("first", "own"))
        return first * first_value + own * value

    def sublayer_norms(self, layer: int, h: Tensor, name: str) -> Tensor:
        pre_norm = self.host.model_type != "olmo2" and self.config.norm_position != "post"
        return rms(h, self.weight(layer, name), self.host.rms_norm_eps) if pre_norm else h

    def output_norm(self, layer: int, y: Tensor, name: str) -> Tensor:
        return rms(y, self.weight(layer, name), self.host.rms_norm_eps) if self.host.model_type == "olmo2" else y

    def logits(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Return the logits for `ids` and `positions` [B, T] with the mask `seen`, bool [B, T, T]."""
        host, config = self.host, self.config
        num_kv_heads, base = host.num_key_value_heads, host.rope_parameters["rope_theta"]
        scale = (host.head_dim if hasattr(host, "head_dim") else host.hidden_size // host.num_attention_heads) ** -0.5
        olmo2 = host.model_type == "olmo2"
        attention_norm = "post_attention_layernorm.weight" if olmo2 else "input_layernorm.weight"
        mlp_norm = "post_feedforward_layernorm.weight" if olmo2 else "post_attention_layernorm.weight"
        state = {"sources": [], "partial": self.weights["model.embed_tokens.weight"][ids]}
        first_value = None
        slots: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of the sublayer, keys unrotated
        for layer in range(host.num_hidden_layers):
            x = self.sublayer_norms(layer, self.read(2 * layer, state), attention_norm)
            raw = {n: x @ self.weight(layer, f"self_attn.{n}_proj.weight").T for n in "qkv"}
            raw["v"] = self.mixed_value(layer, raw["v"], first_value)
            first_value = raw["v"] if layer == 0 else first_value
            query = self.key_norm(layer, self.heads(raw["q"], host.num_attention_heads), "q_norm")
            raw_key, value = self.heads(raw["k"], num_kv_heads), self.heads(raw["v"], num_kv_heads)
            key = rotated(self.key_norm(layer, raw_key), positions, base)
            query = rotated(query, positions, base)
            visible = list(slots.values())
            if config.depth_slots is not None:
                visible = [slots[number] for number in config.depth_slots[layer]]
            elif config.num_depth_slots is not None:
                visible = visible[-config.num_depth_slots :]
            depth_keys = [k if config.depth_key_norm == "writer" else self.key_norm(layer, k) for k, _ in visible]
            if config.depth_key_rope == "same_position":
                depth_keys = [rotated(k, positions, base) for k in depth_keys]
            gate = self.weight(layer, "attn_depth_kv.gate") if config.depth_gate and visible else None
            out = loop_moda(query, key, value, depth_keys, [v for _, v in visible], seen, scale, gate)
            y = out.flatten(2) @ self.weight(layer, "self_attn.o_proj.weight").T
            if config.depth_kv is not None:
                slots[2 * layer] = self.stored_key(layer, raw_key), value
            self.write(2 * layer, layer, attention_norm, state, self.output_norm(layer, y, attention_norm))

            x = self.sublayer_norms(layer, self.read(2 * layer + 1, state), mlp_norm)
            up, down = (self.weight(layer, f"mlp.{n}.weight") for n in ("up_proj", "down_proj"))
            gated = torch.nn.functional.silu(x @ self.weight(layer, "mlp.gate_proj.weight").T) * (x @ up.T)
            if config.depth_kv == "attention+mlp" and self.has(layer, "mlp_depth_kv.k_proj.weight"):
                pair = [x @ self.weight(layer, f"mlp_depth_kv.{n}_proj.weight").T for n in "kv"]
                if config.depth_kv_bias:
                    biases = (self.weight(layer, f"mlp_depth_kv.{n}_proj.bias") for n in "kv")
                    pair = [part + bias for part, bias in zip(pair, biases, strict=True)]
                mlp_key, mlp_value = (self.heads(part, num_kv_heads) for part in pair)
                slots[2 * layer + 1] = self.stored_key(layer, mlp_key), mlp_value
            y = self.output_norm(layer, gated @ down.T, mlp_norm)
            self.write(2 * layer + 1, layer, mlp_norm, state, y)
        h = self.read(2 * host.num_hidden_layers, state)
        h = rms(h, self.weights["model.norm.weight"], host.rms_norm_eps)
        return h @ self.weights["lm_head.weight"].T
