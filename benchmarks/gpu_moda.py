"""MoDA in the GPU suite: the shapes of the paper's table, and head dimension 128, against attention without slots."""

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
#: Those of the targets come first: what does not fit the time is left out from the end.
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
    """One attention call: [B, H, T, d] in memory [B, T, H, d], as projections give them."""

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
    """The package's op."""
    return [moda_attention(_inputs(problem))[0]]


def reference(problem: MoDAProblem) -> list[Tensor]:
    """All logits in one softmax."""
    return [moda_attention_reference(_inputs(problem))[0]]


def _inputs(problem: MoDAProblem) -> ModaInputs:
    p = problem
    return ModaInputs(p.query, p.key, p.value, p.depth_keys, p.depth_values, p.scale, causal=True)


def sequence_alone(attention: Callable) -> Callable[[MoDAProblem], list[Tensor]]:
    """A base row, from a function (query, key, value, scale) -> [B, T, Hq, d]."""
    return lambda problem: [attention(problem.query, problem.key, problem.value, problem.scale)]


def vendor(backend: SDPBackend) -> Callable:
    """Torch's attention with one of its backends."""

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.device.type == "cpu" and backend != SDPBackend.FLASH_ATTENTION:
            raise Absent(f"{backend.name} is for CUDA devices")
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
    """The name of a case."""
    return f"MoDA T={num_tokens} G={group_size} L={num_slots} d={head_dim}"


def cases(tiny: bool, official: Row | None = None) -> list[Case]:
    """The cases of this part; `tiny` ones are for a dry run.

    Args:
        tiny: a few tokens, heads and slots.
        official: the row of the official kernel, if its folder is given.
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
                # The official kernel was written for head dimension 64.
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
