"""Models with AttnRes or MoDA in float64, written from the papers' equations, apart from the code of the package.

They are the oracle of imported and exported checkpoints: their weights are saved under the names of other projects
(`foreign_checkpoints`). Papers: 2603.15031 Eq. 2-6, 2603.15619 section 3.
"""

from dataclasses import dataclass, field

import torch
from moda_oracles import loop_moda
from moda_released import released_weight
from moda_slow_model import rms, rotated
from torch import Tensor, nn

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5]])


@dataclass
class ForeignModel:
    """A decoder of the kind of Llama.

    Attributes:
        sublayers_per_block: with AttnRes, `None` without.
        num_depth_heads: number of heads of a read.
        moda: `"pre"` or `"post"` norms with MoDA, `None` without.
        qk_norm: whether queries and keys are normalised.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        window: number of tokens that attention sees, the own one included.
        eps: epsilon of norms by name: `first` (before the first sublayer), `block`, `final`, `qk`, `read`; others have
            that of `block`.
    """

    num_layers: int = 3
    hidden_size: int = 24
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 40
    vocab_size: int = 23
    rope_theta: float = 1000.0
    sublayers_per_block: int | None = None
    num_depth_heads: int = 1
    moda: str | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    window: int | None = None
    embedding_scale: float = 1.0
    eps: dict[str, float] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its name in this class, with values of float32 that any installation reproduces.

        Names: `embed`, `head`, `final_norm`; `0.q`, `0.q_bias`, `0.q_norm`, ...; `0.o`, `0.gate`, `0.up`, `0.down`,
        `0.attn_norm`, `0.mlp_norm`, `0.depth_k`, `0.depth_v` in layer 0; `query.3` and `key_norm.3` of site 3.
        """
        d, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        shapes = {
            "embed": (self.vocab_size, d),
            "head": (self.vocab_size, d),
            **dict.fromkeys(("q", "o"), (d, d)),
            **dict.fromkeys(("k", "v", "depth_k", "depth_v"), (kv, d)),
            "q_bias": (d,),
            **dict.fromkeys(("k_bias", "v_bias"), (kv,)),
            **dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,)),
            **dict.fromkeys(("gate", "up"), (self.intermediate_size, d)),
            "down": (d, self.intermediate_size),
        }
        kind = name.rpartition(".")[2]
        values = released_weight(f"{name}.weight", *shapes.get(kind, (d,)))
        return (values * self.embedding_scale if name == "embed" else values).float()

    def weight(self, name: str) -> Tensor:
        return self.tensor("embed" if name == "head" and self.tied else name).double()

    def eps_of(self, place: str) -> float:
        return self.eps.get(place, self.eps.get("block", 1e-6))

    def logits(self, ids: Tensor = IDS) -> Tensor:
        """Return the logits `[B, T, vocab_size]`."""
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if self.window is not None:
            seen &= ~torch.ones_like(seen).tril(-self.window)
        positions = torch.arange(length)[None]
        sources, partial = [], self.weight("embed")[ids]
        slots: list[tuple[Tensor, Tensor]] = []
        for site in range(2 * self.num_layers):
            layer, is_mlp = divmod(site, 2)
            h = self.read(site, sources, partial)
            norm = f"{layer}.mlp_norm" if is_mlp else f"{layer}.attn_norm"
            eps = self.eps_of("first" if site == 0 else "block")
            x = h if self.moda == "post" else rms(h, self.weight(norm), eps)
            y = self.mlp(layer, x, slots) if is_mlp else self.attention(layer, x, positions, seen, slots)
            if self.sublayers_per_block is not None and site % self.sublayers_per_block == 0:
                sources, partial = [*sources, partial], y
            else:
                partial = partial + y
            if self.moda == "post":
                partial = rms(partial, self.weight(norm), eps)
        h = rms(self.read(2 * self.num_layers, sources, partial), self.weight("final_norm"), self.eps_of("final"))
        return h @ self.weight("head").T

    def read(self, site: int, sources: list[Tensor], partial: Tensor) -> Tensor:
        if self.sublayers_per_block is None:
            return partial
        query, norm = self.weight(f"query.{site}"), self.weight(f"key_norm.{site}")
        heads = []
        for head in range(self.num_depth_heads):
            part = slice(head * len(query) // self.num_depth_heads, (head + 1) * len(query) // self.num_depth_heads)
            values = [source[..., part] for source in (*sources, partial)]
            # A norm over the whole width, a score per head.
            keys = [rms(source, norm, self.eps_of("read"))[..., part] for source in (*sources, partial)]
            scores = torch.stack([key @ query[part] for key in keys], -1).softmax(-1)
            heads.append(sum(scores[..., i, None] * value for i, value in enumerate(values)))
        return torch.cat(heads, -1)

    def attention(self, layer: int, x: Tensor, positions: Tensor, seen: Tensor, slots: list) -> Tensor:
        def projected(name: str, num_heads: int) -> Tensor:
            flat = x @ self.weight(f"{layer}.{name}").T
            flat = flat + self.weight(f"{layer}.{name}_bias") if self.qkv_bias else flat
            return flat.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        query, key = projected("q", self.num_heads), projected("k", self.num_kv_heads)
        value = projected("v", self.num_kv_heads)
        query, key = self.normed(layer, "q", query), self.normed(layer, "k", key)
        turned = [rotated(each, positions, self.rope_theta) for each in (query, key)]
        depth_keys, depth_values = [k for k, _ in slots], [v for _, v in slots]
        out = loop_moda(*turned, value, depth_keys, depth_values, seen[None], self.head_dim**-0.5)
        if self.moda:
            slots.append((key, value))
        return out.flatten(2) @ self.weight(f"{layer}.o").T

    def normed(self, layer: int, name: str, heads: Tensor) -> Tensor:
        return rms(heads, self.weight(f"{layer}.{name}_norm"), self.eps_of("qk")) if self.qk_norm else heads

    def mlp(self, layer: int, x: Tensor, slots: list) -> Tensor:
        if self.moda:
            key, value = (
                (x @ self.weight(f"{layer}.depth_{name}").T).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
                for name in "kv"
            )
            slots.append((self.normed(layer, "k", key), value))
        gate, up, down = (self.weight(f"{layer}.{name}") for name in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def in_float64(model: nn.Module) -> nn.Module:
    """Let norms and rotary embeddings of a Llama-like host compute in float64 instead of float32.

    Norms keep the epsilon that they have.
    """
    model = model.double().eval()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: rms(x, norm.weight, norm.variance_epsilon)
        elif hasattr(module, "inv_freq"):
            module.forward = _rotary(model.config.text_config)
    return model


def _rotary(host):
    def forward(x, position_ids=None, **kwargs):
        head_dim = getattr(host, "head_dim", None) or host.hidden_size // host.num_attention_heads
        frequency = host.rope_parameters["rope_theta"] ** (
            -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        )
        angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    return forward
