"""MoDA in the GPU suite: shapes of the paper and head dimension 128, compared with attention without slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_cases import FORWARD, FORWARD_BACKWARD, Absent, Case, Row
from gpu_peers import fla_attention, flash_attention_3
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_depthattn.moda_attention_ops import ModaInputs, moda_attention, moda_attention_reference

NUM_KV_HEADS = 8
PARITY_TOKENS = 131
#: (tokens, group size, slots, head dimension), batch 1, 8 key-value heads. The first eleven are the paper's Table 2.
#: Shapes of the targets come first, since the last ones are skipped if time runs out.
SHAPES = (
    (4096, 8, 64, 64),
    (16384, 8, 64, 64),
    (65536, 8, 64, 64),
    (8192, 8, 64, 64),
    (32768, 8, 64, 64),
    (16384, 2, 64, 64),
    (16384, 4, 64, 64),
    (16384, 16, 64, 64),
    (16384, 32, 64, 64),
    (16384, 8, 128, 64),
    (16384, 8, 256, 64),
    (4096, 8, 64, 128),
    (16384, 8, 64, 128),
    (65536, 8, 64, 128),
)


class MoDAProblem:
    """Inputs of one attention call, [B, H, T, d] with the memory layout [B, T, H, d] of projections."""

    def __init__(self, query, key, value, depth_keys, depth_values, cotangents):
        self.query, self.key, self.value = query, key, value
        self.depth_keys, self.depth_values, self.cotangents = depth_keys, depth_values, cotangents
        self.scale = query.shape[-1] ** -0.5

    @staticmethod
    def make(setting: dict, dtype: torch.dtype, device: torch.device) -> MoDAProblem:
        generator = torch.Generator(device).manual_seed(0)
        num_tokens, head_dim, num_kv_heads = setting["num_tokens"], setting["head_dim"], setting["num_kv_heads"]
        num_heads = num_kv_heads * setting["group_size"]

        def draw(heads: int) -> Tensor:
            return torch.randn(1, num_tokens, heads, head_dim, generator=generator, device=device).to(dtype)

        def leaf(heads: int) -> Tensor:
            return draw(heads).transpose(1, 2).requires_grad_()

        return MoDAProblem(
            leaf(num_heads),
            leaf(num_kv_heads),
            leaf(num_kv_heads),
            [leaf(num_kv_heads) for _ in range(setting["num_slots"])],
            [leaf(num_kv_heads) for _ in range(setting["num_slots"])],
            [draw(num_heads)],
        )

    def leaves(self) -> dict[str, list[Tensor]]:
        return {
            "query": [self.query],
            "key": [self.key],
            "value": [self.value],
            "depth keys": self.depth_keys,
            "depth values": self.depth_values,
        }

    def double(self) -> MoDAProblem:
        leaves = [[x.detach().double().requires_grad_() for x in group] for group in self.leaves().values()]
        (query,), (key,), (value,), depth_keys, depth_values = leaves
        return MoDAProblem(query, key, value, depth_keys, depth_values, [x.double() for x in self.cotangents])


def ours(problem: MoDAProblem) -> list[Tensor]:
    """Solve with the op of this package."""
    return [moda_attention(_inputs(problem))[0]]


def reference(problem: MoDAProblem) -> list[Tensor]:
    """Solve with the reference: all logits in one softmax."""
    return [moda_attention_reference(_inputs(problem))[0]]


def _inputs(problem: MoDAProblem) -> ModaInputs:
    p = problem
    return ModaInputs(p.query, p.key, p.value, p.depth_keys, p.depth_values, p.scale, causal=True)


def sequence_alone(attention: Callable) -> Callable[[MoDAProblem], list[Tensor]]:
    """Return a base row from a function (query, key, value, scale) -> [B, T, Hq, d]."""
    return lambda problem: [attention(problem.query, problem.key, problem.value, problem.scale)]


def vendor(backend: SDPBackend) -> Callable:
    """Return torch's attention with a given backend."""

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.device.type == "cpu" and backend != SDPBackend.FLASH_ATTENTION:
            raise Absent(f"{backend.name} needs a CUDA device")
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def _base(name: str, attention: Callable) -> Row:
    return Row(name, "base", sequence_alone(attention), checks_parity=False)


ROWS = (
    _base("vendor attention alone, flash", vendor(SDPBackend.FLASH_ATTENTION)),
    _base("vendor attention alone, cuDNN", vendor(SDPBackend.CUDNN_ATTENTION)),
    _base("vendor attention alone, FA3", flash_attention_3),
    Row("ours", "ours", ours),
    _base("FLA's Triton attention alone", fla_attention),
)


def name_of(num_tokens: int, group_size: int, num_slots: int, head_dim: int) -> str:
    """Return the name of a case."""
    return f"MoDA T={num_tokens} G={group_size} L={num_slots} d={head_dim}"


def cases(tiny: bool, official: Row | None = None) -> list[Case]:
    """Return the cases of this part.

    Args:
        tiny: use few tokens, heads and slots, for a dry run.
        official: row of the official kernel, if available.
    """
    found = []
    for shape in SHAPES[:2] if tiny else SHAPES:
        num_tokens, group_size, num_slots, head_dim = (9, 2, 3, 16) if tiny else shape
        num_kv_heads = 2 if tiny else NUM_KV_HEADS
        setting = {
            "num_tokens": num_tokens,
            "group_size": group_size,
            "num_slots": num_slots,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "batch_size": 1,
        }
        unit = num_tokens * num_kv_heads * head_dim * 2
        forward, backward = 2 * num_slots + 3 * group_size, 4 * num_slots + 5 * group_size
        found.append(
            Case(
                name_of(*shape),
                "moda",
                setting,
                {"num_tokens": min(num_tokens, PARITY_TOKENS)},
                MoDAProblem.make,
                reference,
                # The official kernel only supports head dimension 64.
                (*ROWS, official) if official is not None and head_dim != 128 else ROWS,
                (FORWARD, FORWARD_BACKWARD),
                {
                    FORWARD: (forward * unit, "(2 L + 3 G) u"),
                    FORWARD_BACKWARD: ((forward + backward) * unit, "(2 L + 3 G) u + (4 L + 5 G) u"),
                },
                rounding="attention",
                floor_is_extra=True,
            )
        )
    return found
